"""Several processes as one run: they join, agree, stop at one update, and end together.

    python -m experiments.pretrain --coordinator=host0:4321 --processes=2 --process=0     # on host0
    python -m experiments.pretrain --coordinator=host0:4321 --processes=2 --process=1     # on host1
    python -m experiments.pretrain --distributed              # TPU pods, SLURM, Open MPI: jax finds the others

All get the same flags but for `--process`, and a `--workdir` that they share. Process 0 leads: it
writes metrics, manifests, summary and report. On CPUs the collectives are gloo's.

What devices cannot carry (errors, choices, the wish to stop) goes through the key-value store of
jax's coordination service. Its calls here happen on the main thread, in the same order in every
process. With one process, all of it is the identity.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import jax._src.distributed  # its client has no public name; orbax takes it from here, too

from experiments.settings.sections import ConfigurationError

# Seconds that a process waits for the others' answers. One that died is noticed by its silence,
# long before.
_WAIT = 3600
# In the texts of collectives (XLA's errors come as ValueError where a value is read) and of the
# store without a peer.
_LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED")
_rounds, _runs = itertools.count(), itertools.count()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """Which processes make up the run. Without a coordinator and not automatic: this one alone.

    Args:
      coordinator: host:port where process 0 listens; all processes must reach it.
      processes, process: how many there are, and which one this is, from 0.
      automatic: jax asks the environment (TPU pods, SLURM, Open MPI) for all three.
      join_timeout: seconds to wait for the others at the start; jax's default.
      silence_timeout: seconds without a sign of life after which a process counts as lost and the
        others end; jax's default.

    Raises ConfigurationError.

    >>> Hosts(coordinator="host0:4321", processes=2, process=2)
    Traceback (most recent call last):
    ...
    experiments.settings.sections.ConfigurationError: process=2: with processes=2 give 0 to 1
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    automatic: bool = False
    join_timeout: int = 300
    silence_timeout: int = 100

    def __post_init__(self):
        given = {name: getattr(self, name) for name in ("coordinator", "processes", "process")}
        missing = [name for name, value in given.items() if value is None]
        if self.automatic and len(missing) < 3:
            named = next(name for name in given if name not in missing)
            raise ConfigurationError(
                f"{named}={given[named]!r}: distributed asks the environment; give one of the two"
            )
        if 0 < len(missing) < 3:
            raise ConfigurationError(
                f"{missing[0]}=None: coordinator, processes and process go together; give all "
                "three, or distributed where the environment knows them"
            )
        for name in ("join_timeout", "silence_timeout"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)}: give at least 1 second")
        if missing:
            return
        assert (
            self.coordinator is not None and self.processes is not None and self.process is not None
        )
        host, _, port = self.coordinator.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise ConfigurationError(
                f"coordinator={self.coordinator!r}: write host:port, such as 10.0.0.1:4321"
            )
        if self.processes < 1:
            raise ConfigurationError(f"processes={self.processes}: give at least 1")
        if not 0 <= self.process < self.processes:
            raise ConfigurationError(
                f"process={self.process}: with processes={self.processes} give 0 to "
                f"{self.processes - 1}"
            )

    @property
    def are_several(self) -> bool:
        """Whether there is anybody to join."""
        return self.automatic or self.coordinator is not None


def join(hosts: Hosts) -> None:
    """Become a process of the run; before any use of jax's devices.

    Raises ConfigurationError when process 0 cannot be reached. When others do not come in time, the
    program ends with that message and exit code 2: jax waits for them in a call that ends in an
    abort.
    """
    if not hosts.are_several:
        return
    # its handler of SIGTERM would take the place of the run's own, which `Stop` serves
    jax.config.update("jax_enable_preemption_service", False)
    began = time.monotonic()
    if hosts.process:
        _reach(hosts)
    left = max(1.0, hosts.join_timeout - (time.monotonic() - began))
    # jax waits for the others in a call that ends in an abort: end before it does
    timer = threading.Timer(left, _give_up, [hosts])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            hosts.coordinator,
            hosts.processes,
            hosts.process,
            cluster_detection_method=None if hosts.automatic else "deactivate",
            initialization_timeout=round(left) + 60,  # later than the timer
            heartbeat_timeout_seconds=hosts.silence_timeout,
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigurationError(_unjoined(hosts, str(error))) from error
    finally:
        timer.cancel()


def _unjoined(hosts: Hosts, why: str) -> str:
    if hosts.automatic:
        return (
            f"distributed=True: could not join the others ({why}); give coordinator, processes and "
            "process in its place, or raise join_timeout"
        )
    return (
        f"coordinator={hosts.coordinator!r}: process {hosts.process} of {hosts.processes} could "
        f"not join the others ({why}); start all of them, each with its own number, or raise "
        "join_timeout"
    )


def _give_up(hosts: Hosts) -> None:
    why = f"some did not come within {hosts.join_timeout} s"
    print(f"configuration error: {_unjoined(hosts, why)}", file=sys.stderr, flush=True)
    os._exit(2)


def _reach(hosts: Hosts) -> None:
    """Wait until process 0 listens.

    jax itself ends a process that cannot connect, without an error to catch.
    """
    assert hosts.coordinator is not None
    host, _, port = hosts.coordinator.rpartition(":")
    end = time.monotonic() + hosts.join_timeout
    while True:
        try:
            with socket.create_connection(
                (host.strip("[]"), int(port)), timeout=max(0.1, end - time.monotonic())
            ):
                return
        except OSError as error:
            if time.monotonic() >= end:
                raise ConfigurationError(
                    f"coordinator={hosts.coordinator!r}: no process listens there after "
                    f"{hosts.join_timeout} s ({error}); start process 0 on that host, or correct "
                    "the address, or raise join_timeout"
                ) from error
        time.sleep(0.1)


def joined() -> bool:
    """Whether this process is one of several."""
    return _client() is not None and jax.process_count() > 1


def leads() -> bool:
    """Whether this process writes what the run has once."""
    return not joined() or jax.process_index() == 0


def exchange(text: str) -> list[str]:
    """Each process's text, in their order. Raises RuntimeError when one does not answer."""
    if not joined():
        return [text]
    client, own, turn = _client(), jax.process_index(), next(_rounds)
    client.key_value_set(f"lowrank_jax/{turn}/{own}", text)
    texts = [
        client.blocking_key_value_get(f"lowrank_jax/{turn}/{p}", _WAIT * 1000)
        for p in range(jax.process_count())
    ]
    if turn:  # whoever is in this round has read the one before
        client.key_value_delete(f"lowrank_jax/{turn - 1}/{own}")
    return texts


def by_lead(make: Callable[[], Any], error: type[Exception]) -> Any:
    """What `make()`, called by process 0 alone, returns, in every process.

    A JSON value where there are several. What it raises is raised in the others as `error`.
    """
    if not joined():
        return make()
    value = None
    with together(error):
        value = make() if leads() else None
    return json.loads(exchange(json.dumps(value))[0])


@contextlib.contextmanager
def together(error: type[Exception]) -> Iterator[None]:
    """All leave the block, or none: what one process raises, the others raise as `error`."""
    own = None
    try:
        yield
    except Exception as caught:
        own = caught
    texts = exchange("" if own is None else str(own) or repr(own))
    if own is not None:
        raise own
    for process, text in enumerate(texts):
        if text:
            raise error(f"process {process}: {text}")


class Stopped(BaseException):
    """A run was asked to stop in the middle of work that has nothing to save.

    It is no error: what catches every `Exception` does not catch it.
    """


class Stop:
    """Where a run stops on request, the same place in every process.

    Places are counted: each call of `poll` is one, in the same order everywhere, after an update or
    between two batches of an evaluation. A process that is asked at place k writes k + 2 into the
    store, where the first one to write wins. It does so before it dispatches the next update or
    batch, without which no other process can read the result of that. Whoever is at place k + 2 has
    read the result, so nobody has gone past the place that is written.

    Args:
      asked: set by a signal, in any one of the processes.
    """

    def __init__(self, asked: threading.Event):
        self._asked, self._key = asked, f"lowrank_jax/stop/{next(_runs)}"
        self._place = 0
        self._last: int | None = None

    def set(self) -> None:
        """Ask for it."""
        self._asked.set()

    def before(self) -> bool:
        """Whether to stop before the first update; several processes settle that in `poll`."""
        return self._asked.is_set() and not joined()

    def poll(self) -> bool:
        """Whether to stop here.

        Between two calls something is dispatched; before a call what was dispatched before
        the last one has ended.
        """
        if not joined():
            return self._asked.is_set()
        self._place += 1
        if self._last is None:  # nobody has asked yet, as far as this process knows
            if self._asked.is_set():
                with _tolerated("ALREADY_EXISTS"):
                    _client().key_value_set(self._key, str(self._place + 2))
            with _tolerated("NOT_FOUND"):
                self._last = int(_client().key_value_try_get(self._key))
        return self._last is not None and self._place >= self._last


def end(error: BaseException) -> NoReturn:
    """Say why this process alone ends, and end it at once.

    An orderly exit would wait for the others. They notice by the closed connection (gloo) or by silence.
    """
    where = f"process {jax.process_index()} of {jax.process_count()}"
    text = (str(error).strip() or repr(error)).splitlines()[0]
    if isinstance(error, (jax.errors.JaxRuntimeError, ValueError)) and any(
        word in text for word in _LOST
    ):
        print(
            f"error: {where} lost the others ({text}). One of them has ended: see its output, then "
            "start all of them again; the run goes on from its last checkpoint",
            file=sys.stderr,
        )
    elif isinstance(error, OSError):  # a full disk says all there is to say
        print(f"error: {where} failed, and the others end with it: {text}", file=sys.stderr)
    else:
        traceback.print_exception(error)
        print(f"error: {where} failed, and the others end with it", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def part(rows: jax.sharding.NamedSharding) -> tuple[int, int]:
    """(p, P): this process feeds the p-th of P equal parts of a batch's rows, given their sharding.

    On a mesh whose rows are whole within a group of processes, these feed the same part.
    """
    if not joined():
        return 0, 1
    count = jax.device_count()
    # a batch of one row for each device: which rows lie on this process's devices?
    indices = rows.addressable_devices_indices_map((count,)).values()
    held = {row for index in indices if index for row in range(*index[0].indices(count))}
    first, size = min(held), len(held)
    # neighbours that begin at a multiple of their number
    if max(held) - first + 1 == size and first % size == 0 and count % size == 0:
        return first // size, count // size
    # interleaved: the order of rows within a batch decides nothing
    if size * jax.process_count() == count:
        return jax.process_index(), jax.process_count()
    raise ConfigurationError(
        f"mesh={dict(rows.mesh.shape)}: the rows of process {jax.process_index()} are no part of a "
        "batch by themselves; order the devices so that those of one process are neighbours"
    )


def _client():
    return jax._src.distributed.global_state.client


@contextlib.contextmanager
def _tolerated(code: str) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if code not in str(error):
            raise
