"""The simulation sees the defects that it is there for: functions are replaced by defective ones, and that is found."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest

from deployments import webhooks
from serving.machine import set_variable
from serving.model import forward
from tasks.batch import (
    backfill,
    clean,
    comparison_records,
    delta,
    destination_source,
    gate_records,
    key_check,
    manifest,
    part_digest,
    part_footer,
    parts,
    plan,
    publish,
    survey,
    upsert,
)
from tasks.batch.chunk_scheduler import ChunkScheduler
from tasks.batch.column_statistics import add_tables
from tasks.common import blocks
from tasks.storage import base, open_storage
from tasks.stream.table_commits import TableCommits
from tests.simulation import backfills as _backfills  # noqa: F401 - imported while a defect is put back, it would keep it
from tests.simulation import iceberg as _iceberg  # noqa: F401 - the same
from tests.simulation import settings as _settings  # noqa: F401 - the same
from tests.simulation import simulate as simulation
from tests.simulation import webhooks as _webhooks  # noqa: F401 - the same
from tests.simulation.simulate import simulate
from tests.simulation.storage import SimulatedStorage

_SEEDS, _TRIED_FIRST = 2000, 3
_HELD_IN = ("deployments.", "flows.", "tasks.", "tests.simulation.")

Mutation = Callable[[pytest.MonkeyPatch], None]


def put_back(patch: pytest.MonkeyPatch, function: Callable[..., Any], defect: Callable[..., Any]) -> None:
    """Replace a function by a defective one wherever it is imported."""
    name = function.__name__
    for module in [each for at, each in sys.modules.items() if at.startswith(_HELD_IN)]:
        if getattr(module, name, None) is function:
            patch.setattr(module, name, defect)


def take_parts_of_any_plan(patch: pytest.MonkeyPatch) -> None:
    def find_chunk(of: plan.Plan, path: str) -> parts.ChunkId | None:
        folder, _, name = path.rpartition("/")
        match = parts._NAME.fullmatch(name)
        return None if match is None or folder != of.parts_folder else (int(match[1]), int(match[2]))

    put_back(patch, parts._suffix, lambda _digest: ".parquet")
    put_back(patch, parts._find_chunk, find_chunk)
    identify = part_footer._identity
    put_back(patch, identify, lambda of, chunk: {} if chunk else identify(of, chunk))


def take_parts_of_other_rows(patch: pytest.MonkeyPatch) -> None:
    identify = plan._identify_piece
    # All but which file it is of.
    put_back(patch, identify, lambda of, piece: identify(of, piece)[1:])


def probe_no_store(patch: pytest.MonkeyPatch) -> None:
    put_back(patch, base.check_create_only, lambda _storage: None)
    # One in ten storages overwrites, and most of what is written twice is the same.
    make = simulation._make_weather
    patch.setattr(simulation, "_make_weather", lambda chance: replace(make(chance), is_create_only=False))


def find_newest_by_clock(patch: pytest.MonkeyPatch) -> None:
    def find_newest(
        storage: base.Storage, other_than: str | None = None, *, rows_min: int = 0
    ) -> manifest.Manifest | None:
        found = manifest.read_manifests(storage, [entry.path for entry in storage.entries(plan.ROOT, depth=2)])
        others = [each for each in found if each.run != other_than and each.rows >= rows_min]
        return max(others, key=lambda each: each.planned_at, default=None)

    put_back(patch, manifest.find_newest_run, find_newest)


def let_delta_go_back(patch: pytest.MonkeyPatch) -> None:
    holds = delta._holds_run
    put_back(patch, holds, lambda table, of, storage: holds(table, of.model_copy(update={"order": 1 << 40}), storage))


def list_reused_parts_once(patch: pytest.MonkeyPatch) -> None:
    list_parts = ChunkScheduler._list_parts

    def list_once(self: ChunkScheduler) -> list[int]:
        before = self._reused
        found = list_parts(self)
        self._reused = before if any(before) else self._reused
        return found

    patch.setattr(ChunkScheduler, "_list_parts", list_once)


def clean_reused_parts(patch: pytest.MonkeyPatch) -> None:
    needed = survey.Records.list_needed
    patch.setattr(survey.Records, "list_needed", lambda self: needed(replace(self, plans={})))


def clean_parts_first(patch: pytest.MonkeyPatch) -> None:
    delete = clean._delete

    def delete_parts_first(storage: base.Storage, found: Any, choice: Any, removable: list[clean.Removable]) -> Any:
        clean._delete_all(storage, [each for each in removable if each.kind == "part"])
        return delete(storage, found, choice, removable)

    put_back(patch, delete, delete_parts_first)


def keep_the_oldest(patch: pytest.MonkeyPatch) -> None:
    choose = clean.choose_dropped

    def choose_newest(found: survey.Survey, *given: Any) -> clean.Choice:
        runs = found.records.manifests.items()
        backwards = {run: each.model_copy(update={"order": -each.order}) for run, each in runs}
        return choose(replace(found, records=replace(found.records, manifests=backwards)), *given)

    put_back(patch, choose, choose_newest)


def judge_by_some_rows(patch: pytest.MonkeyPatch) -> None:
    sum_all = gate_records.sum_statistics

    def sum_some(storage: base.Storage, of: plan.Plan) -> Any:
        found = [part_footer.read_part_statistics(storage, each) for each in parts.list_parts(storage, of).values()]
        known = [each for each in found if each is not None]
        return add_tables(known) if known and len(known) == len(found) else sum_all(storage, of)

    put_back(patch, sum_all, sum_some)


def take_a_refusal_for_an_approval(patch: pytest.MonkeyPatch) -> None:
    def is_refused(storage: base.Storage, run: str, digest: str, findings: Any) -> bool:
        return storage.exists(f"{plan.ROOT}/{run}/refused-{gate_records.name_refusal(digest, findings)}.json")

    put_back(patch, gate_records.is_approved, is_refused)


def leave_an_old_row(patch: pytest.MonkeyPatch) -> None:
    rewrite = upsert._rewrite_file
    put_back(patch, rewrite, lambda storage, of, entry, matched: rewrite(storage, of, entry, matched[1:]))


def trust_in_rewritten_files(patch: pytest.MonkeyPatch) -> None:
    put_back(patch, upsert._put_whole, lambda storage, path, data: storage.put_new(path, data))
    # The storage seldom loses what an upsert has written of all that is written.
    put = SimulatedStorage._put

    def lose_more(self: SimulatedStorage, path: str, data: bytes) -> bool:
        return (path.startswith("rewritten/") and self._draw(0.3)) or put(self, path, data)

    patch.setattr(SimulatedStorage, "_put", lose_more)


def upsert_doubled_keys(patch: pytest.MonkeyPatch) -> None:
    put_back(patch, key_check.require_unique, lambda _check, _run: None)


def list_challengers_last(patch: pytest.MonkeyPatch) -> None:
    save, commit = comparison_records.save_challenger_parts, publish.publish

    def publish_first(storage: base.Storage, of: plan.Plan, audit: publish.Audit) -> manifest.Manifest:
        published = commit(storage, of, audit)
        save(storage, of, comparison_records.audit_challengers(storage, of))
        return published

    put_back(patch, save, lambda *_given: None)
    put_back(patch, commit, publish_first)


def lend_inputs_to_challengers(patch: pytest.MonkeyPatch) -> None:
    make = forward.Forward
    put_back(patch, make, lambda *given, **named: make(*given, **{**named, "keeps_inputs": False}))


def believe_the_digest_of_a_part(patch: pytest.MonkeyPatch) -> None:
    read = part_digest.read_digests
    put_back(patch, read, lambda data: (read(data)[0],) * 2)


def take_parts_of_other_features(patch: pytest.MonkeyPatch) -> None:
    identify = plan._identify_features
    # All but which files they are of.
    put_back(patch, identify, lambda pin, contract: identify(pin, contract)[:-1])


def claim_no_source(patch: pytest.MonkeyPatch) -> None:
    put_back(patch, destination_source.claim_source, lambda *_given: None)


def order_runs_by_destination(patch: pytest.MonkeyPatch) -> None:
    claim = publish.claim_order_number

    def claim_there(storage: base.Storage, run: str, *, above: int = 0, table: base.Storage | None = None) -> int:
        return claim(storage, run, above=above)

    put_back(patch, claim, claim_there)


def remember_deliveries_first(patch: pytest.MonkeyPatch) -> None:
    start, seen = webhooks._start_runs, set[str]()

    async def start_new(config: webhooks.WebhookConfig, delivery: str, *given: Any) -> list[str]:
        is_new = delivery not in seen
        seen.add(delivery)
        return await start(config, delivery, *given) if is_new else []

    put_back(patch, start, start_new)


def score_the_version_of_an_event(patch: pytest.MonkeyPatch) -> None:
    fill = webhooks._fill_in

    def fill_in(value: Any, alias: Any) -> Any:
        return fill(value.replace("@{alias}", f"/{alias.version}") if isinstance(value, str) else value, alias)

    put_back(patch, fill, fill_in)


def set_the_variables_of_every_call_at_once(patch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def set_variables(_self: object, variables: Mapping[str, str], _logger: object) -> Generator[None]:
        with ExitStack() as stack:
            for name, value in variables.items():
                is_registry = name == "MLFLOW_TRACKING_URI"
                stack.enter_context(blocks._use_registry(value) if is_registry else set_variable(name, value))
            yield

    patch.setattr(blocks._ProcessVariables, "share", set_variables)


def pass_over_what_any_version_has_scored(patch: pytest.MonkeyPatch) -> None:
    def find_any(piece: backfill.Piece, *_given: Any) -> manifest.Manifest | None:
        return manifest.find_newest_run(open_storage(piece.destination))

    put_back(patch, backfill.find_complete_piece, find_any)


def trust_in_written_lists(patch: pytest.MonkeyPatch) -> None:
    def put_list(self: TableCommits, content: manifest.PartList) -> str:
        data = content.model_dump_json().encode()
        digest = manifest.digest_part_list(data)
        self._storage.put_new(manifest.part_list_path(self._plan.run, digest), data)
        return digest

    patch.setattr(TableCommits, "_put_list", put_list)


@pytest.mark.machines
@pytest.mark.parametrize(
    ("mutation", "first", "seen"),
    [
        pytest.param(take_parts_of_any_plan, 93, "rows missing", id="parts of one plan count for another"),
        pytest.param(take_parts_of_other_rows, 65, "rows missing", id="a run has parts of other rows"),
        pytest.param(probe_no_store, 201, "", id="a store that overwrites is not found out"),
        pytest.param(find_newest_by_clock, 16, "none of the newest runs", id="the newest run is so by a clock"),
        pytest.param(let_delta_go_back, 69, "went back", id="an older run replaces a newer one in a Delta table"),
        pytest.param(order_runs_by_destination, 103, "went back", id="each destination orders its own runs"),
        pytest.param(remember_deliveries_first, 277, "there is no run", id="a delivery is remembered first"),
        pytest.param(score_the_version_of_an_event, 277, "the alias names", id="an event's own version is scored"),
        pytest.param(set_the_variables_of_every_call_at_once, 21, "not its own", id="calls at once share variables"),
        pytest.param(pass_over_what_any_version_has_scored, 137, "backfill", id="a backfill asks for no version"),
        pytest.param(list_reused_parts_once, 1444, "no end", id="a part of an earlier run is lost in a pass"),
        pytest.param(clean_reused_parts, 187, "which run", id="a cleaning takes what an unfinished run has"),
        pytest.param(clean_parts_first, 4, "which run", id="a cleaning takes parts before records"),
        pytest.param(keep_the_oldest, 4, "it drops run", id="a cleaning keeps the oldest runs"),
        pytest.param(judge_by_some_rows, 125, "is judged by", id="a gate judges a run by some of its rows"),
        pytest.param(take_a_refusal_for_an_approval, 13, "nobody has approved it", id="what was refused is approved"),
        pytest.param(leave_an_old_row, 26, "do not make", id="an upsert leaves a row beside the new one"),
        pytest.param(trust_in_rewritten_files, 26, "the table can't be read", id="a file of an upsert is lost or torn"),
        pytest.param(list_challengers_last, 9, "list of its challengers", id="challengers are listed last"),
        pytest.param(lend_inputs_to_challengers, 39, "is published with", id="a challenger writes over the inputs"),
        pytest.param(believe_the_digest_of_a_part, 59, "does not find", id="a verification reads no bytes of parts"),
        pytest.param(take_parts_of_other_features, 315, "is published with", id="a run has parts of other features"),
        pytest.param(claim_no_source, 7, "takes the place of", id="a run takes the place of one of another source"),
        pytest.param(upsert_doubled_keys, 381, "has a key twice", id="keys of an upsert are not checked"),
        pytest.param(trust_in_written_lists, 499, "refers to what is", id="a commit refers to a lost list"),
    ],
)
def test_the_simulation_finds_a_defect_that_is_put_back(
    mutation: Mutation, first: int, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    # A few seeds from the first on, then all: the first spares time, and decides nothing.
    seeds = itertools.chain(range(first, first + _TRIED_FIRST), range(_SEEDS))
    found = next((seed for seed in seeds if any(seen in violation for violation in simulate(seed).violations)), None)

    assert found is not None, f"no seed of {_SEEDS} sees it"
