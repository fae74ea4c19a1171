"""Un-0 checkpoints as its training leaves them: random and small, with the published names, shapes and settings."""

import math

import torch

#: What the two training programs leave in a checkpoint's config, as far as it matters here, and things that do not.
CIFAR = {
    "n_oscillators": 48,
    "n_conditional_oscillators": 8,
    "class_dropout_prob": 0.1,
    "num_steps": 10,
    "decoder_in_channels": None,
    "parameterization": "standard",
    "relativization": "mean_relative",
    "encoding": "sin_cos",
    "solver": "euler",
    "batch_size": 2048,
    "lr": 0.0027,
    "resume": None,
    "freeze_dynamics": False,
}
IMAGENET = {"integration_method": "euler", "data_root": "/data", "epochs": 3600}

FLAVOURS = {
    "cifar10": (CIFAR, 10, 3),
    "cifar10 rk4": ({**CIFAR, "solver": "rk4", "num_steps": 25, "relativization": "ref_oscillator"}, 10, 3),
    "cifar10 mup absolute": ({**CIFAR, "parameterization": "mup", "relativization": "absolute"}, 10, 3),
    "cifar10 raw": ({**CIFAR, "encoding": "raw"}, 10, 3),
    "cifar10 sin": ({**CIFAR, "encoding": "sin"}, 10, 3),
    "imagenet64": (IMAGENET, 1000, 4),
}


def random_model(config, classes, blocks, *, seed=0, compiled="_orig_mod."):
    """A state dict as published, weights as strong as trained ones are."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape, std):
        return torch.randn(shape, generator=random) * std

    n = config.get("n_oscillators", 32)
    m = config.get("n_conditional_oscillators", 1)
    mup = config.get("parameterization", "mup") == "mup"
    channels = (2 if config.get("encoding", "sin_cos") == "sin_cos" else 1) * n // 16
    model = {
        "dynamics.omega": normal(1, n, std=1.0),
        "dynamics.K": normal(n, n, std=1.5 if mup else 1.5 * n**-0.5),
        "dynamics.omega_cond": normal(1, m, std=1.0),
        "dynamics.K_cond": normal(m, m, std=1.0 if mup else m**-0.5),
        "dynamics.K_drive": normal(classes, n, m, std=1.0 if mup else m**-0.5),
    }
    for block in range(blocks):
        wide, channels = channels, max(channels // 2, 32)
        for place, taken in ((1, wide), (3, channels)):
            name = f"decoder.cascade.{block}.net.{place}"
            model[f"{name}.weight"] = normal(channels, taken, 3, 3, std=math.sqrt(2 / (9 * taken)))
            model[f"{name}.bias"] = normal(channels, std=0.1)
    model["decoder.to_output.weight"] = normal(3, channels, 3, 3, std=0.05)
    model["decoder.to_output.bias"] = normal(3, std=0.1)
    return {k.replace(".", f".{compiled}", 1): v for k, v in model.items()}


def publish(path, flavour="cifar10", *, model=None, **more):
    """A training run's checkpoint: the model, and what else such a file holds."""
    config, classes, blocks = FLAVOURS[flavour]
    saved = {
        "model": random_model(config, classes, blocks) if model is None else model,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"betas": (0.9, 0.95)}]},
        "scheduler": {"last_epoch": 7, "lr_lambdas": [None]},
        "epoch": 99,
        "config": config,
        **more,
    }
    torch.save(saved, path)
    return path


def parts_of(file):
    """Of a converted checkpoint: its architecture, tensors by their published names, and what it says of integers."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    from millijoule.workers.generators.un0_checkpoint import Un0Architecture, canonical
    from millijoule.workers.generators.un0_integers import Un0Integers
    from millijoule.workers.records import decode

    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    return (
        decode(Un0Architecture, said["architecture"]),
        canonical(load_file(file)),
        decode(Un0Integers, said["integers"]),
    )
