"""Files for `ray up`: Ray and the cloud's own definitions take them, and refuse every misspelt field and every wrong type."""

from __future__ import annotations

import pytest
import yaml
from support.manifests.clouds import faults
from support.manifests.documents import ROOT, changed, places, spoilt

FILES = sorted((ROOT / "infra/cluster-launcher").glob("*.yaml"))
AWS, GCP = (yaml.safe_load(file.read_text()) for file in FILES)


def named_by_the_file(config, place) -> bool:
    """A kind of node is named by the file alone, and nothing but its head's name is said twice."""
    return place[:-1] == ("available_node_types",) and place[-1] != config["head_node_type"]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_misspelt_field_and_every_wrong_type_is_noticed(file):
    config = yaml.safe_load(file.read_text())
    assert faults(config) == []
    missed = [
        (place, how)
        for place, _ in places(config)
        for how in ("misspelt", "of another type")
        if isinstance(place[-1], str) and not faults(spoilt(config, place, how))
    ]
    assert [m for m in missed if m[1] != "misspelt" or not named_by_the_file(config, m[0])] == []


SPOT = "available_node_types.spot"
WRONG = [
    (AWS, f"{SPOT}.node_config.InstanceMarketOptions.MarketType", "Spot"),
    (AWS, f"{SPOT}.node_config.InstanceMarketOptions.SpotOptions.InstanceInterruptionBehavior", "end"),
    (AWS, f"{SPOT}.node_config.MetadataOptions.HttpTokens", "needed"),
    (AWS, f"{SPOT}.node_config.BlockDeviceMappings.0.Ebs.VolumeType", "gp4"),
    (AWS, f"{SPOT}.node_config.InstanceType", "g6.2xlarger"),
    (AWS, f"{SPOT}.resources", {"CPU": 8, "GPUs": 1}),
    (GCP, f"{SPOT}.node_config.scheduling.provisioningModel", "Spot"),
    (GCP, f"{SPOT}.node_config.scheduling.onHostMaintenance", "STOP"),
    (GCP, f"{SPOT}.node_config.scheduling", [{"preemptible": True}]),
    (GCP, f"{SPOT}.node_config.disks.0.type", "LASTING"),
    (GCP, f"{SPOT}.node_config.disks.0.initializeParams.diskSizeGb", "large"),
    (GCP, f"{SPOT}.node_config.status", "RUNNING"),
    (GCP, "head_node_type", "heads"),
    (GCP, "file_mounts", {"/home/ubuntu/wheel": "./dist"}),
]


@pytest.mark.parametrize(("config", "place", "value"), WRONG)
def test_what_the_cloud_would_refuse_is_noticed(config, place, value):
    assert faults(config) == []
    assert faults(changed(config, place, value)) != []


@pytest.mark.parametrize("config", [AWS, GCP], ids=["aws", "gcp"])
def test_workers_start_from_none_and_spot_workers_are_labelled(config):
    types = config["available_node_types"]
    assert config["provider"]["cache_stopped_nodes"] is False
    assert types["head"]["resources"]["CPU"] == 0
    for market in ("spot", "on-demand"):
        assert types[market]["min_workers"] == 0
        assert types[market]["labels"] == {"ray.io/market-type": market}
        assert types[market]["resources"]["GPU"] == 1
    spot = str(types["spot"]["node_config"])
    assert "'MarketType': 'spot'" in spot or "'provisioningModel': 'SPOT'" in spot
