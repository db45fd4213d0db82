"""What a run says of itself: `run.json` (accuracy, exactness, purity, cost) and the words that go with U."""

import json
import time
from importlib.metadata import version
from typing import Any

import epic_ray
from epic_ray.config import FITTING_SPLIT, RunConfig, fingerprint
from epic_ray.method.basis import orthogonality_error
from epic_ray.method.classifier import SplitClassifier
from epic_ray.run_dir import RunDir
from epic_ray.stages import features, prototypes
from epic_ray.stages.classes import ClassNames
from epic_ray.stages.exactness import prove_exactness
from epic_ray.stages.loading import model_facts
from epic_ray.stages.maps import count_chosen_maps
from epic_ray.stages.resources import Resources, peak_memory_bytes
from epic_ray.stages.rounds import read_basis

_LIBRARIES = ("ray", "torch", "torchvision", "timm", "pyarrow", "pillow")


def make_record(
    config: RunConfig,
    run_dir: RunDir,
    classifier: SplitClassifier,
    classes: ClassNames,
    marks: dict[str, Any],
    made_from: dict[str, str],
    passes: dict[str, features.FeaturePass],
    counts: dict[str, int],
    resources: Resources,
    seconds: float,
) -> dict[str, Any]:
    """The record of a run whose stages are all done; `counts` are those of this start, `marks` those of each stage."""
    basis = read_basis(run_dir)
    proofs = {split: prove_exactness(run_dir, passed, classifier, basis) for split, passed in passes.items()}
    held_out = config.held_out_split
    judged = [FITTING_SPLIT, *([held_out] if held_out else [])]
    proof = proofs[held_out] if held_out else None
    return {
        "name": config.name,
        "method": config.method,
        "epic_ray": epic_ray.__version__,
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "model": {
            "architecture": config.model.architecture,
            "origin": classifier.origin,
            "channels": classifier.channel_count,
            "classes": classifier.class_count,
            "grid": list(classifier.grid),
            "preprocessing": classifier.preprocessing.to_dict(),
            "split": vars(classifier.split),
            "split_max_abs_difference": max(passed.max_abs_difference for passed in passes.values()),
        },
        "class_names_from": classes.origin,
        "backbone_top1": {split: proofs[split].backbone_top1 for split in judged},
        "top1": {split: proofs[split].top1 for split in judged},
        "logits": {
            "max_abs_difference": proof.max_abs_difference if proof else None,
            "top1_agreement": proof.top1_agreement if proof else None,
            "split": held_out,
            "images": proof.images if proof else 0,
        },
        "basis": {"orthogonality_error": orthogonality_error(basis), "start": marks["fit"]["start"]},
        "purity": {name: _purity(run_dir, name, judged) for name in ("before", "after")},
        "counts": _counts(run_dir, passes, counts),
        "failures": marks["features"]["failures"],
        "units": {"all": marks["features"]["units"], "redone": marks["features"]["units_redone"]},
        "maps_kept": marks["features"]["maps_kept"],
        "seconds": {name: mark["seconds"] for name, mark in marks.items()} | {"this_start": round(seconds, 3)},
        "images_per_second": round(marks["features"]["images_done_here"] / max(marks["features"]["seconds"], 1e-9), 2),
        "peak_memory_bytes": {
            "driver": peak_memory_bytes(),
            "feature_actor": marks["features"]["peak_memory_bytes"],
            "fit_worker": marks["fit"]["peak_memory_bytes"],
        },
        "resources": vars(resources),
        "versions": {name: version(name) for name in _LIBRARIES},
        "fingerprints": made_from | {"model": fingerprint(model_facts(config.model, classifier))},
    }


def _purity(run_dir: RunDir, basis: str, splits: list[str]) -> dict[str, dict[str, float]]:
    counts = prototypes.PURITY_COUNTS
    return {split: {f"at_{n}": prototypes.mean_purity(run_dir, basis, split, n) for n in counts} for split in splits}


def _counts(run_dir: RunDir, passes: dict[str, features.FeaturePass], this_start: dict[str, int]) -> dict[str, Any]:
    """Images, and what was done with them: in this start, and in `total` by all the work that is committed."""
    images, decoded, failed = (
        sum(getattr(passed, name) for passed in passes.values()) for name in ("rows", "decoded", "failed")
    )
    again = sum(count_chosen_maps(run_dir, split) for split in passes)  # chosen images are decoded again for their map
    total = {"images": images, "decoded": decoded + again, "forwarded": decoded + again, "failed": failed}
    return {"images": images, **this_start, "failed": failed, "total": total}


def basis_notes(config: RunConfig) -> dict[str, str]:
    """The metadata of `basis.safetensors`."""
    notes = {
        "version": epic_ray.__version__,
        "architecture": config.model.architecture,
        "weights": config.model.weights.rsplit("/", 1)[-1],
        "rows": "channels",
        "columns": "features of the classifier's last map",
    }
    return {"epic_ray": json.dumps(notes)}  # one key: the file's bytes would follow the order of several


def basis_card(config: RunConfig, classifier: SplitClassifier, error: float) -> str:
    """The text beside `basis.safetensors`: what U is and how to use it."""
    channels = classifier.channel_count
    return f"""# Basis U of {config.name}

`basis.safetensors` holds `U`, float32, ({channels} channels, {channels} features): row k is channel k.
Made by epic-ray {epic_ray.__version__} for `{config.model.architecture}` ({classifier.origin}).

With z a cell of the classifier's last feature map and A, b its head: rotated channels are `U @ z`, the head that
reads them is `A @ U.T`, and the logits stay what they were. Largest entry of |U Uᵀ - I|: {error:.2e}.
"""
