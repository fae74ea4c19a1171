"""Which weight files of a component are loaded, where there are several: chosen by names alone, without torch.

The same names make the same choice wherever they are listed: in a folder, in a bucket, on the hub. A component keeps its weights
as `PREFIX.safetensors`, or in numbered shards with an index; `PREFIX.fp16.safetensors` and the like are variants of them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

#: What a name may end in and still be read by a loader: configuration, vocabularies, weights.
READ_SUFFIXES = (".json", ".txt", ".model", ".safetensors", ".jinja", ".tiktoken")

#: What the two libraries look for.
_PREFIXES = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}

_WEIGHTS = re.compile(
    r"(?P<prefix>[^.]+?)(?:\.(?P<variant>[A-Za-z0-9_.]+?))?(?P<shard>-\d{5}-of-\d{5})?"
    r"(?:\.(?P<late>[A-Za-z0-9_]+))?\.safetensors"
)
_EIGHT_BITS = re.compile(r"(?:^|[._])(?:fp8|f8|int8|q8|e4m3|e4m3fn|e5m2)(?:$|[._])")
_HALF = re.compile(r"(?:^|[._])(?:fp16|f16|bf16|float16|bfloat16|half)(?:$|[._])")


@dataclass(frozen=True)
class WeightChoice:
    """The weights of one component that are loaded.

    Attributes:
        variant: as `--variant` names it; None: the files without one.
        files: names in the component's folder, an index included.
        shown: the name under which a loader finds each.
        others: variants that are there besides.
    """

    variant: str | None
    files: tuple[str, ...]
    shown: tuple[str, ...]
    others: tuple[str | None, ...] = ()

    @property
    def index(self) -> str | None:
        """The name of the index, where the weights are in shards."""
        return next((name for name in self.files if name.endswith(".json")), None)


def choose_weights(names: Iterable[str], library: str, variant: str | None) -> WeightChoice | None:
    """The weights among `names`, a component's files, that are loaded; None where there are none.

    Without `variant`, or where the component does not have it, those of the fullest precision: by name, since that is what
    there is before a file is fetched.

    Args:
        library: what the index of the pipeline says of the component.
    """
    groups: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(names):
        if (parsed := _parse(name)) is not None:
            groups[parsed[0]][parsed[1]].append(name)
    usable = [prefix for prefix, found in groups.items() if any(map(_complete, found.values()))]
    wanted = [_PREFIXES.get(library, "model"), *_PREFIXES.values()]
    prefix = next((p for p in wanted if p in usable), None)
    if prefix is None:
        return None
    found = groups[prefix]
    variants = sorted((v for v in found if _complete(found[v])), key=_rank)
    chosen = variant if variant in variants else variants[0]
    files, shown = [], []
    index = next((name for name in found[chosen] if name.endswith(".json")), None)
    for name in found[chosen]:
        if index is None and _is_shard(name):
            continue
        if index is not None and not name.endswith(".json") and not _is_shard(name):
            continue  # the same weights once more, in one file
        files.append(name)
        canonical = f"{prefix}.safetensors.index.json" if name == index else f"{prefix}.safetensors"
        shown.append(name if _is_shard(name) else canonical)
    others = tuple(v for v in variants if v != chosen)
    return WeightChoice(chosen, tuple(files), tuple(shown), others)


def is_weight_file(name: str) -> bool:
    """Whether `name`, without folders, is of weights or of an index of shards."""
    return name.endswith(".safetensors") or _is_index(name)


def _is_index(name: str) -> bool:
    return name.endswith(".json") and "safetensors" in name.split(".") and "index" in name.split(".")


def _is_shard(name: str) -> bool:
    match = _WEIGHTS.fullmatch(name)
    return match is not None and match["shard"] is not None


def _complete(names: list[str]) -> bool:
    """Whether a group holds weights in one file, or an index; shards alone are not found by any loader."""
    return any(name.endswith(".json") or not _is_shard(name) for name in names)


def _parse(name: str) -> tuple[str, str | None] | None:
    """(prefix, variant) of a file of weights or an index; None for any other."""
    if _is_index(name):
        prefix, *words = name.removesuffix(".json").split(".")
        rest = [word for word in words if word not in ("safetensors", "index")]
        return prefix, ".".join(rest) or None
    if (match := _WEIGHTS.fullmatch(name)) is None:
        return None
    if match["shard"] is None and match["late"] is not None and match["variant"] is not None:
        return match["prefix"], f"{match['variant']}.{match['late']}"
    return match["prefix"], match["variant"] or match["late"]


def _rank(variant: str | None) -> tuple[int, str]:
    """The fullest precision first: said to be 32 bits, the files without a variant, others, 16 bits, 8 bits."""
    name = (variant or "").lower()
    if name in ("fp32", "float32"):
        return 0, name
    if variant is None:
        return 1, name
    if _EIGHT_BITS.search(name):
        return 4, name
    return (3 if _HALF.search(name) else 2), name
