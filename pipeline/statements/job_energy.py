"""What one job used, by kind of device, from its tables and `stats.json`: what every statement is made of.

Measured and estimated energy are apart. A kind of which any part was not read has no measured energy, only the part that was
counted, and says what is missing. Energy of more than half an hour between two runs of a job ("off") is nobody's and left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from millijoule.pipeline.energy.carbon import MJ_PER_KWH, Rate, Rates, mean_rate
from millijoule.pipeline.energy.closure import EXACT_CHECKS
from millijoule.pipeline.energy.evidence import MEANINGS, evidence_class
from millijoule.pipeline.energy.intervals import Interval, merged
from millijoule.pipeline.output.job import require_job
from millijoule.pipeline.report.data import read_stats, unfinished
from millijoule.pipeline.report.devices import devices_of_workers, gpu_models, model_of
from millijoule.pipeline.report.gpu_time import measure_gpu_time
from millijoule.pipeline.report.tables import floats, labels, read_energy_table
from millijoule.pipeline.report.timeline import HostDevice, Work, hosts_of_boots, read_work
from millijoule.pipeline.statements.declared import NODE
from millijoule.workers.counted import counted
from millijoule.workers.errors import DamagedError, InputError
from millijoule.workers.layout import STATS_KEY
from millijoule.workers.meters.own_devices import unread_domains
from millijoule.workers.storage.protocol import Store

GPU, CPU, MEMORY = "gpu", "cpu", "memory"
_TYPES = {"gpu": GPU, "cpu": CPU, "dram": MEMORY}
UNKNOWN_CPU = "processor, model not recorded"

#: Boot and domain.
Counter = tuple[str, str]


@dataclass(frozen=True)
class Amount:
    """Energy by one method, and the grams that follow: None is missing, or no intensity was given that covers it."""

    energy_mj: int | None
    gco2e_per_kwh: float | None = None
    gco2e: float | None = None

    @property
    def kwh(self) -> float | None:
        return None if self.energy_mj is None else self.energy_mj / MJ_PER_KWH


@dataclass(frozen=True)
class KindEnergy:
    """The devices of one kind.

    Attributes:
        is_own: whether the job's books are about them: the devices that workers held, and every counter that was read.
            False: processors beside GPUs that nobody read, of which there is only an estimate.
        counted_mj: what was counted, in full or not.
        estimate: the model of CPU time; of processors only, never to be added to what was measured.
        missing: why `measured` is missing.
        counters: when each of its counters was read, by boot and domain: CLOCK_MONOTONIC nanoseconds, disjoint, in order.
    """

    device_type: str
    kind: str
    devices: int
    is_own: bool
    measured: Amount
    counted_mj: int
    estimate: Amount
    missing: tuple[str, ...]
    counters: Mapping[Counter, Sequence[Interval]]


@dataclass(frozen=True)
class JobEnergy:
    """One output.

    Attributes:
        first_attempt: the attempt that began first, None where there is none; two outputs that share it hold one job.
        hours: of devices held, by kind (GPUs and `node`); `hours_missing` says why they are not known.
    """

    output: str
    fingerprint: str
    first_attempt: str | None
    model: str
    millijoule_version: str
    images_ok: int
    evidence_class: str
    energy_methods: tuple[str, ...]
    begin_unix_s: float
    end_unix_s: float
    kinds: tuple[KindEnergy, ...]
    measured: Amount
    missing: tuple[str, ...]  # why `measured` is
    carbon_source: str | None
    carbon_missing: tuple[str, ...]  # why grams are, where energy is known
    pue: float | None
    hours: Mapping[str, float]
    hours_missing: tuple[str, ...]


@dataclass
class _Rows:
    """What is known of a kind while rows are read."""

    devices: set[tuple[str, str]] = field(default_factory=set)
    rows: list[np.ndarray] = field(default_factory=list)
    missing: dict[str, None] = field(default_factory=dict)
    counters: dict[Counter, Sequence[Interval]] = field(default_factory=dict)


def read_job_energy(store: Store, rates: Rates) -> JobEnergy:
    """Read one output.

    Raises:
        InputError: it has no job, or its job has not finished.
        DamagedError: its tables and its totals do not say the same.
        StoreError: storage failed.
    """
    job = require_job(store)
    stats = read_stats(store)
    if why := unfinished(store, job, stats):
        raise InputError(f"{store.url}: the job has not finished: {why}; give its command again to finish it")
    read = partial(read_energy_table, store, run_id=job.fingerprint)
    segments, attempts, env = read("segment"), read("attempt"), read("env")
    if segments is None or attempts is None or not segments.num_rows:
        raise InputError(
            f"{store.url}: has no energy tables; run the same `millijoule generate` again to finish it"
        )
    work = read_work(segments)
    devices_of = devices_of_workers(work, attempts, env)
    models = gpu_models(env)
    total_mj, evidence = stats["energy"].get("total_mj"), stats.get("evidence_class")
    table = _Table(segments, rates)
    kinds = _kinds(table, work, devices_of, models, env, stats)
    missing = [f"{k.kind}: {reason}" for k in kinds if k.is_own for reason in k.missing]
    if total_mj is None and not missing:
        missing.append("the job's energy books are not complete")
    if evidence == "E0" and not missing:
        missing.append("the energy books do not close: evidence class E0")
    counted_mj = sum(k.counted_mj for k in kinds)
    _compare(store, "mJ", counted_mj, counted_mj if total_mj is None else total_mj)
    won = labels(attempts["outcome"]).where(["committed"])
    _compare(store, "accepted images", int(np.nansum(floats(attempts["images_ok"])[won])), stats["images_ok"])
    _check_class(store, evidence, read("closure"))
    counts = np.flatnonzero(table.counts)
    measured = table.amount(counts, table.energy_mj, total_mj if not missing else None)
    hours, hours_missing = _hours(work, devices_of, env, models, stats)
    return JobEnergy(
        output=store.url,
        fingerprint=job.fingerprint,
        first_attempt=_first_attempt(attempts),
        model=stats["model"],
        millijoule_version=stats["millijoule_version"],
        images_ok=stats["images_ok"],
        evidence_class=evidence if isinstance(evidence, str) else "not computed",
        energy_methods=tuple(sorted(m for m in stats["energy_methods"] if m != "missing")),
        begin_unix_s=float(np.nanmin(table.begin_s[counts])),
        end_unix_s=float(np.nanmax(table.end_s[counts])),
        kinds=kinds,
        measured=measured,
        missing=tuple(missing),
        carbon_source=rates.carbon.source if rates.carbon else None,
        carbon_missing=table.carbon_missing(measured),
        pue=rates.pue,
        hours=hours,
        hours_missing=hours_missing,
    )


def _compare(store: Store, what: str, tables: int, stated: int) -> None:
    if tables != stated:
        raise DamagedError(
            f"{store.url}: the energy tables have {tables:,} {what}, {STATS_KEY} has {stated:,}: `millijoule check` says more"
        )


def _check_class(store: Store, stated: Any, closure: pa.Table | None) -> None:
    """Raises DamagedError where `stats.json` states a class that the closure table does not bear out."""
    if closure is None or not isinstance(stated, str):  # an output of before there were any
        return
    passed: dict[str, set[bool | None]] = defaultdict(set)
    for check, verdict in zip(closure["check"].to_pylist(), closure["passed"].to_pylist(), strict=True):
        passed[check].add(verdict)
    best = evidence_class(
        measured=all(passed[check] == {True} for check in EXACT_CHECKS),
        power_agrees=passed["C4"] == {True},
        node_closes=passed["C3"] == {True},
    )
    if stated not in MEANINGS or stated > best:
        raise DamagedError(
            f"{store.url}: {STATS_KEY} states evidence class {stated}, its closure checks show {best} at most: "
            "`millijoule check` says more"
        )


class _Table:
    """The segment table as columns `[n]`, energies in float64 millijoules, NaN where missing."""

    def __init__(self, segments: pa.Table, rates: Rates) -> None:
        self.domain, self.boot = labels(segments["domain"]), labels(segments["boot_id"])
        self.worker = labels(segments["worker_id"])
        self.energy_mj, self.estimate_mj = (floats(segments[c]) for c in ("energy_mj", "energy_estimate_mj"))
        mono = [floats(segments[c]) for c in ("t_open_mono_ns", "t_close_mono_ns")]
        self.mono_ns = [segments[c].to_numpy() for c in ("t_open_mono_ns", "t_close_mono_ns")]
        self.begin_s = floats(segments["t_open_wall_ns"]) / 1e9
        self.end_s = self.begin_s + (mono[1] - mono[0]) / 1e9
        self.counts = ~labels(segments["segment_class"]).where(["off"])
        self.rates = rates

    def counters(self) -> Iterator[tuple[str, str, np.ndarray]]:
        """Boot, domain and the numbers of the rows that count, of every counter."""
        for key, rows in _grouped(self.boot.codes * (len(self.domain.names) + 1) + self.domain.codes + 1):
            boot, domain = divmod(key, len(self.domain.names) + 1)
            rows = rows[self.counts[rows]]
            if domain and len(rows):  # 0: the worker measured nothing
                yield self.boot.names[boot], self.domain.names[domain - 1], rows

    def times(self, rows: np.ndarray) -> list[Interval]:
        """When the energy of these rows, of one counter, was counted."""
        rows = rows[np.isfinite(self.energy_mj[rows])]
        begin, end = (t[rows] for t in self.mono_ns)
        order = np.argsort(begin, kind="stable")
        begin, reach = begin[order], np.maximum.accumulate(end[order])
        breaks = np.flatnonzero(begin[1:] > reach[:-1])
        firsts, lasts = [0, *(breaks + 1).tolist()], [*breaks.tolist(), len(rows) - 1]
        return [(int(begin[a]), int(reach[b])) for a, b in zip(firsts, lasts, strict=True) if len(rows)]

    def domains_of_workers(self) -> dict[str, set[str]]:
        """What each worker has read, as far as its segments say."""
        pairs = np.unique(np.stack([self.worker.codes, self.domain.codes]), axis=1).T.tolist()
        found: dict[str, set[str]] = defaultdict(set)
        for worker, domain in pairs:
            if worker >= 0 and domain >= 0:
                found[self.worker.names[worker]].add(self.domain.names[domain])
        return found

    def estimates(self) -> Iterator[tuple[str, np.ndarray]]:
        """Worker and the numbers of its rows that have an estimate."""
        for code, rows in _grouped(self.worker.codes):
            rows = rows[self.counts[rows] & np.isfinite(self.estimate_mj[rows])]
            if code >= 0 and len(rows):
                yield self.worker.names[code], rows

    @staticmethod
    def total(rows: np.ndarray, energy_mj: np.ndarray) -> int:
        """The sum of what is known; whole millijoules stay whole below 2**53."""
        return int(np.nansum(energy_mj[rows]))

    def amount(self, rows: np.ndarray, energy_mj: np.ndarray, total_mj: int | None) -> Amount:
        """`total_mj`, used as the rows of these numbers used it over time, with its grams."""
        rate = self.rates.carbon
        if rate is None or total_mj is None:
            return Amount(total_mj, rate.values[0] if rate is not None and rate.is_constant else None)
        per_kwh = self._mean(rate, rows[np.isfinite(self.begin_s[rows])], energy_mj)
        if per_kwh is None:
            return Amount(total_mj, None, 0.0 if total_mj == 0 else None)
        return Amount(total_mj, per_kwh, total_mj / MJ_PER_KWH * per_kwh * (self.rates.pue or 1.0))

    def _mean(self, rate: Rate, rows: np.ndarray, energy_mj: np.ndarray) -> float | None:
        mean = mean_rate(rate, self.begin_s[rows], self.end_s[rows], energy_mj[rows])
        # a table's nearest row would stand in for hours that it does not have: a statement fills nothing in
        return None if mean is None or (mean.fallback_share > 0 and not rate.is_constant) else mean.per_kwh

    def carbon_missing(self, measured: Amount) -> tuple[str, ...]:
        rate = self.rates.carbon
        if rate is None:
            return ("no carbon intensity was given (--gco2-per-kwh)",)
        if measured.energy_mj and measured.gco2e is None:
            return (f"{rate.source} does not cover all times at which energy was used",)
        return ()


def _first_attempt(attempts: pa.Table) -> str | None:
    """By time, then by name; None where there is none. A look at each column: a job may have millions of attempts."""
    started = attempts["t_start_wall_ns"]
    first: str | None = pc.min(attempts["attempt_id"].filter(pc.equal(started, pc.min(started)))).as_py()
    return first


def _kinds(
    table: _Table,
    work: Work,
    devices_of: Mapping[str, HostDevice],
    models: Mapping[tuple[str, str], str],
    env: pa.Table | None,
    stats: Mapping[str, Any],
) -> tuple[KindEnergy, ...]:
    hosts = hosts_of_boots(work, devices_of)
    found: dict[tuple[str, str], _Rows] = defaultdict(_Rows)

    def kind_of(host: str, domain: str) -> tuple[str, str]:
        family, _, name = domain.partition(":")
        device_type = _TYPES.get(family, family)
        if device_type == GPU:
            return GPU, model_of(HostDevice(host, name), models)
        return device_type, models.get((host, CPU), UNKNOWN_CPU) if device_type == CPU else device_type

    for boot, domain, rows in table.counters():
        host = hosts.get(boot, boot)
        kind = found[kind_of(host, domain)]
        kind.devices.add((host, domain))
        kind.rows.append(rows)
        kind.counters[boot, domain] = table.times(rows)
        if n := int(np.isnan(table.energy_mj[rows]).sum()):
            kind.missing[f"{counted(n, 'stretch', 'stretches')} of {domain} on {host} not read"] = None
    held, read = _held(env), table.domains_of_workers()
    for worker, on in devices_of.items():
        if on.device == "unknown":
            why = f"worker {worker} on {on.host} did not say what it held"
            found["unknown", "device not recorded"].missing[why] = None
            continue
        for domain in unread_domains(held.get(worker, (on.device,)), read[worker]):
            kind = found[kind_of(on.host, domain)]
            kind.missing[f"{domain.removeprefix('gpu:')} on {on.host} was never read"] = None
            kind.devices.add((on.host, domain))
    for account in stats["energy"].get("unclosed", ()):
        for domain in account.get("devices", ()):
            why = f"nobody read it when worker {account['worker_id']} had ended: {account['reason']}"
            found[kind_of(account["host"], domain)].missing[why] = None

    own = set(found)
    estimated: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
    for worker, rows in table.estimates():
        key = kind_of(devices_of[worker].host, CPU)
        estimated[key].append(rows)
        found[key]  # a kind, if only of an estimate
    return tuple(_kind(table, key, found[key], key in own, estimated[key]) for key in sorted(found))


def _kind(
    table: _Table, key: tuple[str, str], of: _Rows, is_own: bool, estimated: Sequence[np.ndarray]
) -> KindEnergy:
    rows = np.concatenate([np.zeros(0, np.int64), *of.rows])
    counted_mj = table.total(rows, table.energy_mj)
    missing = tuple(of.missing) if is_own else ("no counter of it was read; outside the boundary",)
    estimate = Amount(None)
    if estimated:
        modelled = np.concatenate(estimated)
        estimate = table.amount(modelled, table.estimate_mj, table.total(modelled, table.estimate_mj))
    return KindEnergy(
        device_type=key[0],
        kind=key[1],
        devices=len(of.devices),
        is_own=is_own,
        measured=table.amount(rows, table.energy_mj, None if missing else counted_mj),
        counted_mj=counted_mj,
        estimate=estimate,
        missing=missing,
        counters=of.counters,
    )


def _held(env: pa.Table | None) -> dict[str, tuple[str, ...]]:
    """The devices that each worker held, as far as it stated them."""
    columns = ("worker_id", "gpus", "device")
    rows: Iterable[Any] = () if env is None else zip(*(env[c].to_pylist() for c in columns), strict=True)
    return {worker: tuple(filter(None, (gpus or device or "").split(","))) for worker, gpus, device in rows}


def _grouped(codes: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each value of `codes` with the numbers of the rows that have it."""
    order = np.argsort(codes, kind="stable")
    values, begins = np.unique(codes[order], return_index=True)
    yield from zip(values.tolist(), np.split(order, begins[1:]), strict=True)


def _hours(
    work: Work,
    devices_of: Mapping[str, HostDevice],
    env: pa.Table | None,
    models: Mapping[tuple[str, str], str],
    stats: Mapping[str, Any],
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Hours for which the job held devices, by kind: GPUs by model, and `node`, every machine with a worker on it."""
    unclosed = {a["worker_id"] for a in stats["energy"].get("unclosed", ())}
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for number, rows in _grouped(work.worker):
        span = float(work.begin_s[rows].min()), float(work.end_s[rows].max())
        worker = work.workers[number]  # by boot: hosts may have one name, and containers of one host several
        spans[work.boot_of_worker.get(worker, devices_of[worker].host)].append(span)
    hours = {NODE: sum(end - begin for of in spans.values() for begin, end in merged(of)) / 3600}
    missing = [f"until when worker {worker} held its devices is not known" for worker in sorted(unclosed)]
    gpus = measure_gpu_time(work, devices_of, env, models, stats["images_ok"], None, unclosed)
    if gpus is not None:
        hours |= {m.model: m.hours for m in gpus.models}
        if gpus.workers_unknown:
            missing.append(f"which GPUs {counted(gpus.workers_unknown, 'worker')} held is not recorded")
    return hours, tuple(missing)
