"""The process of a rank other than 0: loads its part of a pipeline, and draws along with rank 0, without ever seeing an image.

Ends when rank 0 does, whatever it is at: the channel between them closes.
"""

from __future__ import annotations

import os
import queue
import shutil
import socket
import sys
import threading
import time
from dataclasses import replace

import torch

from millijoule.workers.diffusion.engine_modules import prepare_pipeline
from millijoule.workers.diffusion.families import describe_family
from millijoule.workers.diffusion.loading import load_pipeline
from millijoule.workers.diffusion.memory import PipelineMemory
from millijoule.workers.diffusion.pipeline_call import PipelineCall
from millijoule.workers.drawing.isolate import AttemptCancelled
from millijoule.workers.drawing.out_of_memory import is_out_of_memory, loading, release_memory
from millijoule.workers.engines.open import open_engine
from millijoule.workers.generators.registry import model_path
from millijoule.workers.orphan import exit_with_parent
from millijoule.workers.pipeline_parts.model_files import read_model
from millijoule.workers.ranks.communicator import Communicator, is_cut_off
from millijoule.workers.ranks.messages import Answer, Channel, Order, Task
from millijoule.workers.visible_text import log_to_stderr


class Rank:
    """A loaded part of a pipeline."""

    def __init__(self, task: Task) -> None:
        folder = read_model(model_path(task.model), task.options)
        self.communicator = Communicator(task.rank, task.ranks, task.device)
        self.engine = open_engine(task.options, task.device)
        self.loaded = loaded = load_pipeline(folder, task.device, task.options, rank=task.rank)
        prepare_pipeline(loaded.pipeline, self.engine)
        loaded.pipeline.to(task.device)
        loaded.rungs.skip_work(captured=self.engine.fixed_shapes)
        self.memory = PipelineMemory(loaded.pipeline, task.device, self.engine)
        family = describe_family(loaded.pipeline, str(folder.path))
        self.call = PipelineCall(loaded, family, self._after_step)

    def do(self, order: Order) -> None:
        """Raises what goes wrong."""
        if order.what == "join":
            self.communicator.join(order.meeting_point)
        elif order.what == "save memory":
            if not self.engine.release():
                self.memory.save()
                self.engine.renew()
        else:
            assert order.call is not None
            torch.set_num_threads(order.threads)
            if order.call.float32:
                with self.engine.plain():
                    self.call.draw_along(order.call)
            else:
                self.call.draw_along(order.call)

    def _after_step(self) -> None:
        if self.communicator.tell():
            raise AttemptCancelled

    def answer(self, order: Order) -> Answer:
        """Do as `order` says, and say how that ended; out of the group where it failed, so that nobody waits in vain."""
        try:
            self.do(order)
            return Answer(order.number, "done")
        except AttemptCancelled:
            return Answer(order.number, "called off")
        except Exception as error:
            words = f"{type(error).__name__}: {error}".split("\n")[0][:500]
            cut_off, memory = is_cut_off(error), is_out_of_memory(error)
        self.communicator.leave()
        release_memory()
        return Answer(order.number, "cut off" if cut_off else "out of memory" if memory else "failed", words)


def main() -> None:
    log_to_stderr("%(levelname)s %(name)s: %(message)s")
    exit_with_parent()
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    task = next(channel.receive(Task))
    orders: queue.Queue[Order] = queue.Queue()

    def listen() -> None:
        for order in channel.receive(Order):
            if order.what == "leave":
                rank.communicator.leave()
            else:
                orders.put(order)
        shutil.rmtree(task.folder, ignore_errors=True)  # where rank 0 could not any more
        os._exit(0)

    try:
        with loading():
            rank = Rank(task)
    except Exception as error:
        channel.send(Answer(0, "failed", f"{type(error).__name__}: {error}"[:500]))
        raise
    threading.Thread(target=listen, name="orders", daemon=True).start()
    channel.send(Answer(0, "done", rank.loaded.spread_words, time.process_time_ns()))
    while True:
        answer = rank.answer(orders.get())
        channel.send(replace(answer, cpu_ns=time.process_time_ns()))


if __name__ == "__main__":
    main()
