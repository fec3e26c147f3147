"""Overnight on Kubernetes: a base and overlays for kustomize, and what renders and checks them.

base/ holds every server, overlays/ the kinds of machines that runs are on, and components/endpoints what is changed
about manifests of endpoints. work-pool.json is the base job template of Prefect's Kubernetes pools, base/pools/ what
each pool sets of it. `kubectl apply -k` takes an overlay. `render_overlay` does the same with every image set, and
refuses what would fail on the cluster.
"""

from infra.kubernetes.checks import (
    ManifestRefused,
    Reference,
    check_documents,
    list_references,
)
from infra.kubernetes.render import (
    OPTIONAL_COMPONENTS,
    KustomizeMissing,
    list_images,
    list_overlays,
    parse_images,
    render_overlay,
    write_documents,
)

__all__ = [
    "OPTIONAL_COMPONENTS",
    "KustomizeMissing",
    "ManifestRefused",
    "Reference",
    "check_documents",
    "list_images",
    "list_overlays",
    "list_references",
    "parse_images",
    "render_overlay",
    "write_documents",
]
