"""Dense couplings for the GPU's kernels, and how they run in Triton's interpreter."""

from __future__ import annotations

import pytest

#: Of a block: what fills a block is slow in the interpreter.
FEWER_IMAGES = 8


def relaxed_by_kernels(coupling, calls, **options):
    """Last phases of calls, (phases, classes, steps, horizon) each, of one `DenseKernel`; for `support.interpreted`."""
    from millijoule.kernels.gpu import dense_coupling as kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "IMAGES", FEWER_IMAGES)
        kernel = kernels.DenseKernel(coupling, "cpu", **options)
        return [kernel(*call).clone() for call in calls]


def relaxed_on_the_chip(coupling, call, tile, together):
    """The same with K kept, in blocks of `tile`: rows, and how often how many images. The interpreter runs blocks one after the
    other, so blocks that share images get a launch for each step (`together` 1), and never wait."""
    from millijoule.kernels.gpu import dense_coupling as kernels

    run = kernels.run_resident
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "IMAGES", FEWER_IMAGES)
        if len(tile) == 3:
            patch.setitem(kernels.RESIDENT, coupling.n, tile)
        else:  # of block-sparse K, whose rows are 64
            patch.setitem(kernels.RESIDENT_SPARSE, coupling.n, tile)
        patch.setattr(kernels, "run_resident", lambda *given: run(*given[:-1], at_once=4, together=together))
        return kernels.DenseKernel(coupling, "cpu", resident=True)(*call).clone()


def un0_drawn_on_gpu(file, calls):
    """Images of (classes, seeds, steps) by the GPU's form of a converted Un-0 checkpoint, and its kernels; for `support.interpreted`."""
    from support.un0_checkpoints import parts_of

    from millijoule.kernels.gpu import dense_coupling as kernels
    from millijoule.kernels.gpu import upsampling_decoder
    from millijoule.workers.generators.un0_gpu import gpu_form

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "IMAGES", FEWER_IMAGES)
        patch.setattr(
            upsampling_decoder, "PIXELS", 2048
        )  # a program of the interpreter is slow, its arrays are not
        form = gpu_form(*parts_of(file), "cpu")
        assert form is not None
        return form.kernels, [form.draw(*call) for call in calls]
