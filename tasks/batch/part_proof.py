"""The proof of parts that a run has from earlier ones: some are scored again, and the bytes are compared."""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from serving.errors import BadInput, shorten_error
from serving.model.interface import Model
from tasks.batch.manifest import find_manifest
from tasks.batch.part_check import Damage, write_undigested
from tasks.batch.part_digest import read_digests
from tasks.batch.parts import ChunkId, part_path
from tasks.batch.plan import Plan, manifest_path
from tasks.batch.planned_models import load_planned_model, open_planned_model
from tasks.batch.reuse import describe_making
from tasks.batch.run_records import load_plan
from tasks.batch.score import Scorer
from tasks.batch.scoring_result import ScoringResult
from tasks.batch.staging import stage_again
from tasks.batch.verify import RunVerification
from tasks.storage import LocalStorage, Storage

_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%")
_COUNT = re.compile(r"\d+")
_REASONS_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvingModel:
    """The model of a plan as it was loaded here, and the versions and processor that it runs with."""

    model: Model
    made_with: tuple[str, ...]


def load_proving_model(plan: Plan) -> ProvingModel:
    """Load the very model of a plan on the engine that the plan is tied to. Raises ModelUnfit, ModelNotFound."""
    resolved = open_planned_model(plan)
    model = load_planned_model(plan, resolved, plan.options)
    return ProvingModel(model=model, made_with=describe_making(resolved, plan.environment))


def count_sample(sample: str, parts: int) -> int:
    """Return how many of so many parts a sample has: of a percentage at least one. Raises BadInput.

    Args:
        sample: A percentage such as 1% or 100%, or a number of parts such as 20.
        parts: How many there are.
    """
    text = sample.strip()
    if (match := _PERCENT.fullmatch(text)) and 0 < (percent := float(match[1])) <= 100:  # noqa: PLR2004 - all of them
        return min(parts, max(1, round(parts * percent / 100)))
    if _COUNT.fullmatch(text) and int(text) > 0:
        return min(parts, int(text))
    message = f"A sample must be a percentage such as 1% or 100%, or a number of parts such as 20, got {sample!r}."
    raise BadInput(message)


def prove_reused_parts(
    storage: Storage,
    verification: RunVerification,
    sample: str,
    *,
    seed: int,
    load: Callable[[Plan], ProvingModel] = load_proving_model,
) -> RunVerification:
    """Score a sample of the parts that a run has from earlier ones again, and return its verification with the result.

    Of a run that was published by an earlier release, parts that bear no digest of their bytes are among them.
    The same seed chooses the same parts. Nothing is written at the destination. A part whose source is gone or was
    changed since can't be proved: a note says so, and it is no damage.

    Args:
        storage: The destination.
        verification: What the verification of the run came to.
        sample: How many parts: 1%, 100%, or 20.
        seed: Of the choice of parts.
        load: Loads the model of a plan.

    Raises:
        BadInput: The sample does not read.
        ModelNotFound, ModelUnfit: The model of the plan can't be loaded here.
    """
    count_sample(sample, 1)
    has_plan = all(damage.kind != "plan" for damage in verification.damages)
    plan = load_plan(storage, verification.run) if has_plan else None
    undigested = [] if plan is None else _list_undigested(storage, plan, verification)
    if plan is None or not (plan.reused or undigested):
        note = "It has no part of an earlier run: nothing was scored again."
        return verification.model_copy(update={"notes": (*verification.notes, note)})
    doubtful = sorted({*plan.reused_parts, *undigested})
    chosen = sorted(random.Random(seed).sample(doubtful, count_sample(sample, len(doubtful))))  # noqa: S311 - no secret
    loaded = load(plan)
    with tempfile.TemporaryDirectory(prefix="overnight-") as scratch:
        proof = _prove(storage, plan, chosen, loaded, LocalStorage(Path(scratch)))
    whose = "of earlier runs" + (" or without a digest" if undigested else "")
    told = f"{proof.proved:,} of {len(chosen):,} parts, chosen of {len(doubtful):,} {whose} with seed {seed},"
    notes = [f"{told} were scored again to the same bytes.", *proof.notes]
    if differ := sorted(set(loaded.made_with) ^ set(plan.made_with)):
        words = "They were made with other versions, or on another processor, so last digits may differ"
        notes.append(f"{words}: {', '.join(differ)[:300]}.")
    damages = (*verification.damages, *proof.damages)
    return verification.model_copy(
        update={
            "damages": damages,
            "notes": (*verification.notes, *notes),
            "parts_proved": proof.proved,
            "state": "damaged" if damages else verification.state,
        }
    )


def _list_undigested(storage: Storage, plan: Plan, verification: RunVerification) -> list[ChunkId]:
    """Return the chunks of a published run whose parts bear no digest of their bytes."""
    is_read = all(damage.path != manifest_path(plan.run) for damage in verification.damages)
    manifest = find_manifest(storage, plan.run) if is_read else None
    paths = set() if manifest is None else {part.path for part in manifest.parts if not part.digest}
    return [at for at in plan.chunks if part_path(plan, at) in paths]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Proof:
    proved: int
    damages: tuple[Damage, ...]
    notes: tuple[str, ...]


def _prove(
    storage: Storage, plan: Plan, chosen: Sequence[ChunkId], loaded: ProvingModel, scratch: LocalStorage
) -> _Proof:
    """Score chunks of a plan into a folder of their own, and compare each part with the one that stands."""
    source, unread = stage_again(plan, chosen, scratch)
    lost = {at: shorten_error(error) for at, error in unread.items()}
    left = [at for at in chosen if at not in lost]
    again = source.model_copy(
        update={
            "shards": tuple((plan.chunk(at),) for at in left),
            "rows": sum(plan.chunk(at).rows for at in left),
            "reused": (),
            # Parts of challengers are none of an earlier run's.
            "challengers": (),
        }
    )
    result = _score(again, loaded.model, scratch) if left else ScoringResult()
    lost |= {left[shard]: shorten_error(fault) for (shard, _), fault in result.faults.items()}
    proved, damages = 0, list[Damage]()
    for shard, at in enumerate(left):
        made, stands = scratch.read(part_path(again, (shard, 0))), storage.read(part_path(plan, at))
        if made is None or stands is None:
            # One that is gone from the destination is a damage of the verification already.
            continue
        is_same = _is_same(stands, made)
        proved += is_same
        if not is_same:
            message = f"The part must have the bytes that its rows are scored to, got others: {_compare(stands, made)}."
            damages.append(Damage(kind="bytes", path=part_path(plan, at), message=message))
    return _Proof(proved=proved, damages=tuple(damages), notes=tuple(_describe_lost(lost)))


def _is_same(stands: bytes, made: bytes) -> bool:
    """Whether a part has the bytes that were made now, without the digest where it bears none."""
    if read_digests(stands)[0]:
        return stands == made
    parquet = pq.ParquetFile(pa.BufferReader(made))
    return bool(stands == write_undigested(parquet.metadata, parquet.read(use_threads=False)))


def _score(plan: Plan, model: Model, scratch: LocalStorage) -> ScoringResult:
    scorer = Scorer(plan=plan, destination=scratch, model=model, max_reject_fraction=1.0)
    result = ScoringResult()
    for shard in scorer.scheduler.begin():
        result.add(scorer.score_shard(shard))
    return result


def _describe_lost(lost: dict[ChunkId, str]) -> list[str]:
    """Return the note of parts that could not be proved, with some of the reasons."""
    if not lost:
        return []
    reasons = list(dict.fromkeys(lost.values()))
    more = len(reasons) - _REASONS_SHOWN
    shown = "; ".join(reasons[:_REASONS_SHOWN]) + (f"; and {more} more" if more > 0 else "")
    return [f"{len(lost):,} parts can't be proved, since their source is not what it was: {shown}."]


def _compare(stands: bytes, made: bytes) -> str:
    try:
        one, other = (pq.read_table(pa.BufferReader(each), use_threads=False) for each in (stands, made))
    except (pa.ArrowException, OSError, ValueError) as error:
        return shorten_error(error)
    if one.num_rows != other.num_rows or one.schema.names != other.schema.names:
        return f"{one.num_rows:,} rows of {one.schema.names}, not {other.num_rows:,} of {other.schema.names}"
    differing = [name for name in one.schema.names if not one.column(name).equals(other.column(name))]
    if not differing:
        return "every value is the same, and how it is stored is not"
    return ", ".join(f"{name} in {_count_differing(one.column(name), other.column(name))} rows" for name in differing)


def _count_differing(one: pa.ChunkedArray, other: pa.ChunkedArray) -> str:
    """Return how many of the rows differ, nulls among them; of columns that can't be compared so, that some do."""
    try:
        values = pc.fill_null(pc.not_equal(one, other), fill_value=False)
        differ = pc.or_(values, pc.xor(one.is_null(), other.is_null()))
    except pa.ArrowException:
        return "some"
    return f"{pc.sum(differ).as_py():,}"
