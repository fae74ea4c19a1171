// A batch split among threads that end with the call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace millijoule {

// `work(first, end)` for runs that make up 0 to `count`, one in this thread. `work` must not throw.
template <typename Work>
void in_threads(int64_t count, int64_t threads, const Work& work) {
  const int64_t used = std::max<int64_t>(1, std::min(threads, count));
  std::vector<std::thread> others;
  int64_t begun = 1;
  try {
    others.reserve(used);
    for (; begun < used; ++begun) others.emplace_back(work, count * begun / used, count * (begun + 1) / used);
  } catch (const std::system_error&) {  // no more threads: this one does the rest
  }
  work(0, count / used);
  if (begun < used) work(count * begun / used, count);
  for (auto& other : others) other.join();
}

}  // namespace millijoule
