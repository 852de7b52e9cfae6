"""The Kubernetes manifest fits the schemas of Kubernetes, and its pods know who they are."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest
import yaml

from mezo_dist.distributed.environment import ClusterEnvironment, discover

from .conftest import ROOT

VERSION = "1.37"
MANIFEST = list(yaml.safe_load_all((ROOT / "launcher" / "kubernetes.yaml").read_text(encoding="utf-8")))
SERVICE, JOB = MANIFEST
POD = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


@pytest.mark.parametrize("resource", MANIFEST, ids=lambda resource: resource["kind"])
def test_it_fits_the_schema(resource: Any) -> None:
    kubernetes_validate.validate(resource, VERSION, strict=True)


def test_the_schema_is_not_blind() -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**JOB, "spec": {**JOB["spec"], "completions": "two"}}, VERSION, strict=True)


def test_its_pods_know_their_ranks() -> None:
    index = {"metadata.annotations['batch.kubernetes.io/job-completion-index']": "1"}
    environment = {
        entry["name"]: entry["value"] if "value" in entry else index[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        for entry in CONTAINER["env"]
    }
    assert discover(environment) == ClusterEnvironment(
        "RANK and WORLD_SIZE", 1, 2, 0, 0, "mezo-dist-0.mezo-dist", 29500
    )
    assert JOB["spec"]["completions"] == JOB["spec"]["parallelism"] == 2
    # The host name of pod 0 of an indexed Job is JOB-0, known under the Service that is the pods' subdomain.
    assert f"{JOB['metadata']['name']}-0.{SERVICE['metadata']['name']}" == environment["MASTER_ADDR"]
    assert POD["subdomain"] == SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["selector"] == {"job-name": JOB["metadata"]["name"]}


def test_it_starts_training_that_can_be_resumed() -> None:
    assert CONTAINER["command"][:4] == ["python", "-m", "mezo_dist", "train"]
    assert "--output.if_exists=resume" in CONTAINER["command"]
