"""Files for `ray up`: Ray's own validator takes them, and notices a misspelt field or a wrong type."""

from __future__ import annotations

import copy

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from support.manifests.documents import ROOT, places, spoilt

FILES = sorted((ROOT / "infra/cluster-launcher").glob("*.yaml"))
#: Passed on to the cloud's own interface, which Ray does not check.
FREE = {"node_config", "provider", "file_mounts", "labels", "resources", "available_node_types"}


def right(config) -> bool:
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except Exception:  # its validator and what prepares for it raise many kinds
        return False
    return True


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_rays_validator_takes_the_file_and_no_spoilt_one(file):
    config = yaml.safe_load(file.read_text())
    assert right(config)
    known = {"type", "region", "availability_zone", "cache_stopped_nodes"}
    known |= {"aws": {"use_internal_ips"}, "gcp": {"project_id"}}[file.stem]
    assert set(config["provider"]) == known
    assert config["provider"]["cache_stopped_nodes"] is False
    missed = [
        (place, how)
        for place, _ in places(config)
        for how in ("misspelt", "of another type")
        if not FREE & set(place[:-1])
        and isinstance(place[-1], str)
        and place != ("auth",)
        and right(spoilt(config, place, how))
    ]
    assert missed == []


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_workers_start_from_none_and_spot_workers_are_labelled(file):
    types = yaml.safe_load(file.read_text())["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    for market in ("spot", "on-demand"):
        assert types[market]["min_workers"] == 0
        assert types[market]["labels"] == {"ray.io/market-type": market}
    spot = str(types["spot"]["node_config"])
    assert "'MarketType': 'spot'" in spot or "'provisioningModel': 'SPOT'" in spot
