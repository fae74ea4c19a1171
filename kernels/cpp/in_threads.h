// A batch split among threads that end with the call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace millijoule {

// `work(first, end)` for runs that make up 0 to `count`, one in this thread; where threads or memory for them run out, this one does
// what is left. `work` must not throw.
template <typename Work>
void in_threads(int64_t count, int64_t threads, const Work& work) {
  struct Others {
    std::vector<std::thread> threads;
    ~Others() {
      for (auto& thread : threads) thread.join();
    }
  } others;
  const int64_t used = std::max<int64_t>(1, std::min(threads, count));
  int64_t begun = 1;
  try {
    others.threads.reserve(used);
    for (; begun < used; ++begun) others.threads.emplace_back(work, count * begun / used, count * (begun + 1) / used);
  } catch (...) {
  }
  work(0, count / used);
  if (begun < used) work(count * begun / used, count);
}

}  // namespace millijoule
