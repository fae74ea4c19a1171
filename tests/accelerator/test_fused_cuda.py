"""On an NVIDIA GPU: fused kernels give what their equations say at real sizes, launched, captured and compiled, and images stay.

Skipped where there is none. In a rehearsal, on a CPU, every fused form is its plain one, and sizes are small.
"""

from itertools import islice

import pytest
import torch
from support.accelerator import DEVICE, MISSING, REHEARSAL

pytestmark = pytest.mark.skipif(MISSING, reason="no CUDA device")

on_a_board = pytest.mark.skipif(REHEARSAL, reason="a rehearsal: there is no board")

#: Of the largest value: roundings of a type, with float32 statistics.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def cases(device=DEVICE):
    """One at a time: together they take gigabytes."""
    from millijoule.jobs.measuring.kernel_cases import make_cases

    return make_cases(device)


def number_of_cases():
    return 1 if MISSING else len(list(cases("cpu")))


def widened(arguments):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]


def tensors(found):
    return found if isinstance(found, tuple) else (found,)


def assert_near(found, exact, tolerance):
    for a, b in zip(tensors(found), tensors(exact), strict=True):
        assert float((a.double() - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("number", range(number_of_cases()))
def test_a_fused_form_is_as_exact_as_its_type(number):
    """Launched, and replayed from a CUDA graph with other values in its inputs."""
    case = next(islice(cases(), number, None))
    tolerance = TOLERANCE[case.arguments[0].dtype]
    assert_near(case.fused(*case.arguments), case.plain(*widened(case.arguments)), 2 * tolerance)
    if DEVICE == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = case.fused(*case.arguments)
        case.arguments[0].mul_(0.5)
        graph.replay()
        assert_near(out, case.plain(*widened(case.arguments)), 2 * tolerance)


@on_a_board
@pytest.mark.parametrize(
    "kernel", ["group_norm_silu", "gated_ada_layer_norm", "gated_activation", "rms_norm_rope"]
)
def test_torch_compile_sees_through_a_fused_form(kernel):
    case = next(c for c in cases() if c.kernel == kernel)
    compiled = torch.compile(case.fused, fullgraph=True, dynamic=False)
    for a, b in zip(tensors(compiled(*case.arguments)), tensors(case.fused(*case.arguments)), strict=True):
        assert torch.equal(a, b)


@on_a_board
def test_an_image_s_norm_has_the_same_bits_in_any_batch():
    from millijoule.kernels.group_norm_silu import group_norm_silu

    for channels, side in ((64, 16), (320, 64)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(5, channels, side, side, device=DEVICE).to(memory_format=layout)
            together = group_norm_silu(x, 16)
            assert torch.equal(group_norm_silu(x[3:4], 16), together[3:4])
            assert torch.equal(group_norm_silu(x, 16), together)


@on_a_board
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_baseline_s_network_gives_what_it_gave(dtype, layout):
    pytest.importorskip("diffusers")
    from millijoule.workers.engines.injection.policy import inject
    from millijoule.workers.generators.registry import load_generator

    network = load_generator("baseline", device="cuda").pipeline.unet.to(dtype)
    assert torch.cuda.is_available()
    x = torch.randn(4, network.config.in_channels, 16, 16, device="cuda", dtype=dtype)
    text = torch.randn(4, 16, network.config.cross_attention_dim, device="cuda", dtype=dtype)
    exact = network.to(torch.float32)(x.float(), 500, text.float()).sample
    network.to(dtype).to(memory_format=layout)
    injection = inject(network, "cuda")
    assert injection.replaced["GEGLU"] == 4
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    assert_near(network(x, 500, text).sample, exact.double(), tolerance)
