"""Stores: ``StoreRules`` holds for each of them; what is SQLite's own follows, and what is Redis's."""

from __future__ import annotations

import contextlib
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from redis import exceptions as redis_errors
from redises import make_redis

from controller.redis_errors import translated
from controller.redis_options import RedisOptions, read_password
from controller.rows import AnswerRow, AttemptRow, ModelRow, RegionRow, RoundRow, RunRow
from controller.store import SCHEMA_VERSION, SqliteStore
from hierfl.aggregation import ColumnGroup, GroupKind, Weighting
from hierfl.errors import (
    ConfigError,
    DiskFull,
    InvalidTransition,
    NotTheLeader,
    StaleEpoch,
    StorageError,
    StoreDamaged,
    StoreLocked,
    StoreTooNew,
    StoreUnreachable,
)
from hierfl.job import Job, JobHead
from hierfl.plan import TaskSpec
from hierfl.records import PartialHead
from hierfl.rounds import CollectionClosed, QuorumUnreachable, RoundState
from hierfl.runs import RunCancelled, RunFinished, RunPaused, RunStarted, RunState
from hierfl.types import AttemptKey, ModelHash, RegionId, RunId, TaskKind

__all__ = ["make_redis"]

RUN, EU, US = RunId("digits-1"), RegionId("eu"), RegionId("us")
GROUPS = (ColumnGroup(name="train", kind=GroupKind.FIXED, s=32, max_abs=8.0, weighting=Weighting.WEIGHT, num_values=3),)


def run_row(run=RUN, **changes) -> RunRow:
    usual = RunRow(
        run=run,
        request_id="q",
        job=Job(job=JobHead(name="digits", app="digits", rounds=3), app={"lr": 0.1, "sizes": [1, 2]}),
        regions=(EU, US),
        groups=GROUPS,
        exact_in_two_tiers=True,
        layout_hash="b" * 64,
        num_params=3,
        submitted_unix_ns=5,
        model_hash=ModelHash("a" * 64),
    )
    return replace(usual, **changes)


def attempt_row(round_number=1, attempt=1, task=TaskKind.TRAIN) -> AttemptRow:
    spec = TaskSpec(
        kind=task,
        app="digits",
        app_version="",
        config={"lr": 0.1},
        client_part={"proximal_mu": 0.01},
        groups=GROUPS,
        metrics=(),
        evaluate=True,
    )
    return AttemptRow(
        run=RUN,
        task=task,
        round=round_number,
        attempt=attempt,
        spec=spec,
        base_version=0,
        base_hash=ModelHash("a" * 64),
        opened_unix_ns=6,
    )


def answer_row(region=EU, round_number=1, attempt=1, digest="blake3:00") -> AnswerRow:
    head = PartialHead(
        region=region,
        run=RUN,
        base_model_hash=ModelHash("a" * 64),
        task_hash="t",
        groups=GROUPS,
        weight=4,
        num_sites=2,
        num_updates=2,
        metrics={"num_examples": 4},
        region_epoch=1,
        seal_id="s",
    )
    key = AttemptKey(RUN, TaskKind.TRAIN, round_number, attempt)
    return AnswerRow(
        run=key.run,
        task=key.task,
        round=key.round,
        attempt=key.attempt,
        region=region,
        received_unix_ns=7,
        digest=digest,
        head=head,
        blob="sha256:11",
        size_bytes=100,
    )


def model_row(version=1) -> ModelRow:
    return ModelRow(
        run=RUN,
        version=version,
        model_hash=ModelHash("a" * 64),
        layout_hash="b" * 64,
        num_params=3,
        size_bytes=12,
        committed_unix_ns=8,
        record=b"{}",
        signature=b"\x00\xff",
        certificate=b"c",
    )


def round_row(number=1, task=TaskKind.TRAIN) -> RoundRow:
    return RoundRow(
        run=RUN,
        task=task,
        round=number,
        attempt=1,
        version=number,
        model_hash=ModelHash("a" * 64),
        weight=4,
        num_sites=2,
        num_updates=2,
        metrics={"train_loss": 0.5},
        seconds=0.1,
        committed_unix_ns=8,
    )


class StoreRules:
    """What every store keeps to. A subclass gives ``open_store``: each call opens the one store of the test."""

    def test_every_row_comes_back_as_it_was_after_a_restart(self, open_store):
        store = open_store()
        epoch = store.lead()
        store.write(
            epoch,
            run_row(),
            attempt_row(),
            answer_row(),
            answer_row(US),
            model_row(),
            round_row(),
            RegionRow(region=EU, region_epoch=3, store_id="z"),
        )
        identity = store.store_id
        store.close()
        store = open_store()
        assert store.store_id == identity
        assert store.runs() == [run_row()]
        assert store.attempts(RUN, TaskKind.TRAIN, 1) == [attempt_row()]
        assert store.answers(attempt_row().key) == [answer_row(), answer_row(US)]
        assert store.models(RUN) == [model_row()]
        assert store.rounds(RUN) == [round_row()]
        assert store.regions() == [RegionRow(region=EU, region_epoch=3, store_id="z")]

    def test_rows_come_in_the_order_of_their_numbers(self, open_store):
        store = open_store()
        epoch = store.lead()
        store.write(epoch, round_row(11, TaskKind.EVALUATE), *(round_row(n) for n in (10, 2, 1)))
        store.write(epoch, *(model_row(n) for n in (10, 9, 0)), attempt_row(1, 10), attempt_row(1, 9), attempt_row(10))
        assert [row.round for row in store.rounds(RUN)] == [1, 2, 10, 11]
        assert [row.version for row in store.models(RUN)] == [0, 9, 10]
        assert store.model(RUN, 9) == model_row(9)
        assert store.model(RUN, 1) is None
        assert [row.attempt for row in store.attempts(RUN, TaskKind.TRAIN, 1)] == [9, 10]

    def test_rows_of_one_run_round_or_attempt_are_not_those_of_another(self, open_store):
        store = open_store()
        epoch = store.lead()
        store.write(epoch, model_row(), answer_row(attempt=1), answer_row(attempt=11), run_row(), run_row(RunId("b")))
        assert store.models(RunId("digits")) == []
        assert len(store.answers(AttemptKey(RUN, TaskKind.TRAIN, 1, 1))) == 1
        assert store.answers(AttemptKey(RUN, TaskKind.EVALUATE, 1, 1)) == []
        assert [row.run for row in store.runs()] == ["b", RUN]

    def test_each_leader_has_a_higher_epoch_than_all_before(self, open_store):
        store = open_store()
        assert store.lead() == 1
        assert store.lead(at_least=7) == 8
        store.close()
        assert open_store().lead(at_least=3) == 9

    def test_a_replaced_leader_changes_nothing(self, open_store):
        store = open_store()
        old = store.lead()
        store.lead()
        with pytest.raises(StaleEpoch):
            store.write(old, run_row())
        assert store.runs() == []

    def test_a_leader_goes_on_under_its_own_epoch_only(self, open_store):
        store = open_store()
        old = store.lead()
        store.renew(old)
        new = store.lead(9, under=old)
        assert new == 10
        store.renew(new)
        for late in (lambda: store.renew(old), lambda: store.lead(under=old)):
            with pytest.raises(StaleEpoch):
                late()
        store.write(new, run_row())
        assert store.lead() == 11

    def test_a_write_is_all_or_nothing(self, open_store):
        store = open_store()
        epoch = store.lead()
        store.write(epoch, answer_row())
        with pytest.raises(StoreDamaged):
            store.write(epoch, run_row(), answer_row(digest="blake3:01"))
        assert store.runs() == []
        assert store.answers(attempt_row().key) == [answer_row()]

    def test_what_is_written_once_may_be_written_again_unchanged(self, open_store):
        store = open_store()
        epoch = store.lead()
        for _ in range(2):
            store.write(epoch, answer_row(), model_row(), round_row())
        assert len(store.models(RUN)) == 1

    def test_what_moves_on_is_replaced(self, open_store):
        store = open_store()
        epoch = store.lead()
        store.write(epoch, run_row(), attempt_row())
        store.write(epoch, run_row().after(RunStarted()), attempt_row().after(CollectionClosed(regions=(EU,))))
        assert store.runs()[0].state is RunState.RUNNING
        assert store.attempts(RUN, TaskKind.TRAIN, 1)[0].state is RoundState.MERGING


class TestSqliteStore(StoreRules):
    @pytest.fixture
    def open_store(self, tmp_path):
        opened = []

        def open_one() -> SqliteStore:
            opened.append(SqliteStore(tmp_path / "dir" / "controller.sqlite", "fed"))
            return opened[-1]

        yield open_one
        for store in opened:
            store.close()

    def test_a_second_process_is_refused_while_the_first_has_it(self, open_store, tmp_path):
        open_store()
        with pytest.raises(StoreLocked):
            SqliteStore(tmp_path / "dir" / "controller.sqlite", "fed")
        code = (
            "import sys; from controller.store import SqliteStore; from hierfl.errors import StoreLocked\n"
            "from pathlib import Path\n"
            "try: SqliteStore(Path(sys.argv[1]), 'fed')\n"
            "except StoreLocked: print('locked')"
        )
        path = str(tmp_path / "dir" / "controller.sqlite")
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
        assert done.stdout == "locked\n"

    def test_a_store_of_a_later_release_is_refused(self, open_store, tmp_path):
        open_store().close()
        with sqlite3.connect(tmp_path / "dir" / "controller.sqlite") as db:
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
        db.close()
        with pytest.raises(StoreTooNew):
            open_store()

    def test_another_federations_store_is_refused(self, open_store, tmp_path):
        open_store().close()
        with pytest.raises(StoreDamaged, match="'fed'"):
            SqliteStore(tmp_path / "dir" / "controller.sqlite", "other")

    def test_a_file_that_is_no_store_is_refused(self, tmp_path):
        (tmp_path / "controller.sqlite").write_bytes(b"something else" * 1000)
        with pytest.raises(StoreDamaged):
            SqliteStore(tmp_path / "controller.sqlite", "fed")

    def test_a_full_disk_is_said_and_changes_nothing(self, open_store):
        store = open_store()
        epoch = store.lead()
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages + 1}")
        with pytest.raises(DiskFull):
            store.write(epoch, *(replace(model_row(n), record=b"x" * 1000) for n in range(50)))
        assert store.models(RUN) == []
        store._db.execute("PRAGMA max_page_count = 1000000")
        store.write(epoch, model_row())


class TestRedisStore(StoreRules):
    @pytest.fixture
    def redis(self, make_redis):
        return make_redis()

    @pytest.fixture
    def open_store(self, redis):
        from controller.store_redis import RedisStore

        opened = []

        def open_one(federation="fed", lease_s=6.0, **options):
            store = RedisStore(RedisOptions(url=redis.url, **options), federation, lease_s=lease_s)
            opened.append(store)
            return store

        yield open_one
        for store in opened:
            store.close()

    # -------------------------------------------------------------- the lease

    def test_who_does_not_lead_is_told_who_does_until_the_lease_runs_out(self, open_store):
        one, two = open_store(lease_s=0.3), open_store(lease_s=0.3)
        first = one.lead(name="one:1")
        with pytest.raises(NotTheLeader, match="one:1 leads") as told:
            two.lead(name="two:2")
        assert told.value.leader == "one:1"
        second = until(lambda: two.lead(name="two:2"), NotTheLeader)
        assert second == first + 1
        for late in (lambda: one.write(first, run_row()), lambda: one.renew(first), lambda: one.lead(under=first)):
            with pytest.raises(StaleEpoch):
                late()
        with pytest.raises(NotTheLeader, match="two:2"):
            one.lead()
        assert two.runs() == []
        two.write(second, run_row())

    def test_a_renewed_lease_does_not_run_out(self, open_store, redis):
        one, two = open_store(lease_s=0.5), open_store(lease_s=0.5)
        epoch = one.lead()
        began = time.monotonic()
        while time.monotonic() < began + 1.0:
            one.renew(epoch)
            with pytest.raises(NotTheLeader):
                two.lead()

    def test_a_lease_that_ran_out_unseen_is_taken_up_again(self, open_store, redis):
        one, two = open_store(), open_store()
        epoch = one.lead()
        redis.command("DEL", "hierfl:{fed}:lease")
        one.renew(epoch)
        with pytest.raises(NotTheLeader):
            two.lead()

    def test_a_store_that_is_closed_leads_no_more(self, open_store):
        one, two = open_store(), open_store()
        epoch = one.lead()
        one.close()
        assert two.lead() == epoch + 1

    # -------------------------------------------------------------- writes that come twice, or late

    def test_a_write_that_comes_again_changes_nothing_and_is_answered_the_same(self, open_store):
        store = open_store()
        epoch = store.lead()
        store.write(epoch, run_row(), answer_row())
        store._number -= 1  # as where the answer was lost
        store.write(epoch, run_row(), answer_row())
        assert store.runs() == [run_row()]

    def test_a_write_that_was_on_its_way_while_later_ones_were_made_changes_nothing(self, open_store):
        store = open_store()
        epoch = store.lead()
        store.write(epoch, run_row())
        store.write(epoch, run_row(version=1))
        store._number = 0
        with pytest.raises(StaleEpoch):
            store.write(epoch, run_row())
        assert store.runs()[0].version == 1

    def test_a_frozen_redis_fails_calls_within_three_seconds_and_its_late_write_changes_nothing(
        self, open_store, redis
    ):
        store = open_store()
        epoch = store.lead()
        redis.signal(signal.SIGSTOP)
        for call in (lambda: store.write(epoch, run_row()), store.runs, store.lead):
            began = time.monotonic()
            with pytest.raises(StoreUnreachable, match="gives no answer in time"):
                call()
            assert time.monotonic() - began < 3.0
        redis.signal(signal.SIGCONT)
        store.lead()
        with pytest.raises(StaleEpoch):
            store.write(epoch, run_row(version=9))
        assert [row.version for row in store.runs()] in ([], [0])

    def test_a_killed_redis_comes_back_with_everything_it_acknowledged(self, open_store, redis):
        store = open_store()
        epoch = store.lead()
        for number in range(50):
            store.write(epoch, model_row(number))
        redis.kill()
        with pytest.raises(StoreUnreachable, match="is not there"):
            store.write(epoch, model_row(50))
        redis.start()
        assert [row.version for row in store.models(RUN)] == list(range(50))
        store.write(epoch, model_row(50))

    # -------------------------------------------------------------- what Redis refuses

    def test_no_memory_is_said_and_changes_nothing(self, open_store, redis):
        store = open_store()
        epoch = store.lead()
        redis.command("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(StoreUnreachable, match="raise its `maxmemory`"):
            store.write(epoch, run_row(), model_row())
        with pytest.raises(StoreUnreachable, match="maxmemory"):
            store.lead()
        redis.command("CONFIG", "SET", "maxmemory", "0")
        assert store.runs() == store.models(RUN) == []
        store.write(epoch, run_row())

    @pytest.mark.parametrize(
        ("name", "value"), [("appendonly", "no"), ("appendfsync", "everysec"), ("maxmemory-policy", "allkeys-lru")]
    )
    def test_a_redis_that_may_forget_is_refused_with_the_line_that_mends_it(self, open_store, redis, name, value):
        redis.command("CONFIG", "SET", name, value)
        with pytest.raises(ConfigError, match=f"`CONFIG SET {name} ") as told:
            open_store()
        assert told.value.value == value

    def test_a_replica_is_refused(self, open_store, redis):
        store = open_store()
        epoch = store.lead()
        redis.command("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises(StoreUnreachable, match="is a replica"):
            store.write(epoch, run_row())

    def test_replicas_that_may_lag_are_warned_of(self, make_redis, caplog):
        from controller.store_redis import RedisStore

        port = free_port()
        primary = make_redis(f"--port {port}")
        make_redis(f"--replicaof 127.0.0.1 {port}")
        until(lambda: wait_for(primary.command("INFO", "replication"), "state=online"), AssertionError)
        RedisStore(RedisOptions(url=primary.url), "fed").close()
        assert "has replicas and no `min-replicas-to-write 1`" in caplog.text
        caplog.clear()
        primary.command("CONFIG", "SET", "min-replicas-to-write", "1")
        RedisStore(RedisOptions(url=primary.url), "fed").close()
        assert caplog.text == ""

    def test_user_and_password_come_from_url_and_file_and_a_wrong_one_is_said(self, open_store, redis, tmp_path):
        from controller.store_redis import RedisStore

        allowed = ["~hierfl:*", "+@read", "+@write", "+@scripting", "+config|get"]
        redis.command("ACL", "SETUSER", "hierfl", "on", ">secret", *allowed)
        redis.command("ACL", "SETUSER", "weak", "on", ">secret", "~hierfl:*", "+get")
        (tmp_path / "password").write_text("secret\n")
        url = redis.url.replace("unix://", "unix://hierfl@")
        password = read_password(tmp_path / "password", {})
        store = RedisStore(RedisOptions(url=url, password=password), "fed")
        store.write(store.lead(), run_row())
        assert store.runs() == [run_row()]
        store.close()
        with pytest.raises(StorageError, match="refuses this user or password"):
            RedisStore(RedisOptions(url=url, password="wrong"), "fed")
        with pytest.raises(StorageError, match=r"does not allow this user .*config\|get"):
            RedisStore(RedisOptions(url=url.replace("hierfl@", "weak@"), password=password), "fed")
        redis.command("ACL", "SETUSER", "default", ">other")
        with pytest.raises(StorageError, match="HIERFL_STORE_PASSWORD_FILE"):
            RedisStore(RedisOptions(url=redis.url), "fed")

    # -------------------------------------------------------------- identity

    def test_federations_share_a_redis_and_see_nothing_of_each_other(self, open_store):
        one, two = open_store("one"), open_store("two")
        one.write(one.lead(), run_row())
        assert two.lead() == 1
        assert two.runs() == []
        assert one.store_id != two.store_id

    def test_a_wiped_redis_gets_nothing_written_and_is_another_store(self, open_store, redis):
        store = open_store()
        epoch = store.lead()
        store.write(epoch, run_row())
        redis.command("FLUSHALL")
        for call in (lambda: store.write(epoch, run_row()), lambda: store.renew(epoch), store.runs, store.lead):
            with pytest.raises(StoreDamaged, match="was Redis wiped"):
                call()
        assert redis.command("DBSIZE") == "0"
        assert open_store().store_id != store.store_id

    def test_a_store_of_a_later_release_is_refused(self, open_store, redis):
        open_store()
        redis.command("HSET", "hierfl:{fed}:meta", "schema", str(SCHEMA_VERSION + 1))
        with pytest.raises(StoreTooNew):
            open_store()

    def test_two_that_lead_at_once_are_never_both_leaders(self, open_store):
        stores = [open_store() for _ in range(6)]
        led: list[int] = []

        def try_to_lead(store):
            with contextlib.suppress(NotTheLeader):
                led.append(store.lead())

        threads = [threading.Thread(target=try_to_lead, args=(store,)) for store in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert led == [1]


def wait_for(text, words):
    assert words in text


def until(call, refusal):
    """The first answer that is no ``refusal``, within 5 s."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return call()
        except refusal:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)  # a lease ends by Redis's clock, which nobody here can turn


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://:secret@host:6379", "must hold no password"),
        ("redis://host:6379?socket_timeout=60", "hierfl's own"),
        ("http://host", "redis://"),
        ("redis://", "redis://"),
    ],
)
def test_a_store_url_is_checked_and_a_password_in_it_is_not_repeated(url, words):
    with pytest.raises(ConfigError, match=words) as told:
        RedisOptions(url=url)
    assert "secret" not in str(told.value)


def test_a_row_keeps_the_reason_of_its_event_and_the_time_of_its_end():
    running = run_row().after(RunStarted())
    paused = running.after(RunPaused(reason="why"))
    assert (paused.reason, paused.ended_unix_ns) == ("why", 0)
    ended = paused.after(RunCancelled(), now_unix_ns=9)
    assert (ended.state, ended.reason, ended.ended_unix_ns) == (RunState.CANCELLED, "", 9)
    assert attempt_row().after(QuorumUnreachable(reason="far")).reason == "far"
    with pytest.raises(InvalidTransition):
        ended.after(RunFinished())


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (redis_errors.OutOfMemoryError("command not allowed"), StoreUnreachable, "maxmemory"),
        (redis_errors.ResponseError("MISCONF Errors writing to the AOF file"), StoreUnreachable, "make room"),
        (redis_errors.BusyLoadingError("Redis is loading"), StoreUnreachable, "reading its data"),
        (redis_errors.ReadOnlyError("You can't write"), StoreUnreachable, "replica"),
        (redis_errors.ResponseError("NOREPLICAS Not enough good replicas"), StoreUnreachable, "min-replicas"),
        (redis_errors.TimeoutError("Timeout reading from socket"), StoreUnreachable, "in time"),
        (redis_errors.ConnectionError("Connection refused"), StoreUnreachable, "is it running"),
        (redis_errors.AuthenticationError("invalid username-password pair"), StorageError, "refuses this user"),
        (redis_errors.ConnectionError("[SSL: CERTIFICATE_VERIFY_FAILED]"), StorageError, "--store-ca"),
        (redis_errors.ResponseError("ERR something new"), StorageError, "something new"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value)[:20],
)
def test_what_redis_answers_is_said_with_the_next_step(error, kind, words):
    told = translated(error, "redis://here")
    assert type(told) is kind
    assert words in str(told)
    assert str(told).startswith("Redis at redis://here ")


@pytest.fixture
def certificates(tmp_path):
    """A CA, a server's certificate for 127.0.0.1 and a client's, as PEM files."""
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a CA")])
    begins = datetime.now(UTC) - timedelta(minutes=5)

    def issue(name, subject, key, **extension):
        builder = x509.CertificateBuilder(ca_name, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(begins).not_valid_after(begins + timedelta(hours=1))
        san = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
        ca = x509.BasicConstraints(ca=bool(extension), path_length=None)
        made = builder.add_extension(ca, critical=True).add_extension(san, critical=False).sign(ca_key, SHA256())
        (tmp_path / f"{name}.pem").write_bytes(made.public_bytes(Encoding.PEM))
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (tmp_path / f"{name}.key").write_bytes(private)

    issue("ca", ca_name, ca_key, ca=True)
    for name in ("server", "client"):
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issue(name, subject, ec.generate_private_key(ec.SECP256R1()))
    return tmp_path


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_redis_over_tls_with_certificates_on_both_sides(make_redis, certificates):
    from controller.store_redis import RedisStore

    port, at = free_port(), certificates
    files = f"--tls-ca-cert-file {at}/ca.pem", f"--tls-cert-file {at}/server.pem", f"--tls-key-file {at}/server.key"
    make_redis(f"--tls-port {port}", *files)
    url = f"rediss://127.0.0.1:{port}"
    own = {"certificate": at / "client.pem", "key": at / "client.key"}
    store = RedisStore(RedisOptions(url=url, ca=at / "ca.pem", **own), "fed")
    store.write(store.lead(), run_row())
    assert store.runs() == [run_row()]
    store.close()
    with pytest.raises(StorageError, match="--store-ca"):
        RedisStore(RedisOptions(url=url, **own), "fed")  # the system's CAs do not know it
    with pytest.raises(StorageError):
        RedisStore(RedisOptions(url=url, ca=at / "ca.pem"), "fed")
    with pytest.raises(ConfigError, match="rediss://"):
        RedisOptions(url="redis://127.0.0.1", ca=at / "ca.pem")
