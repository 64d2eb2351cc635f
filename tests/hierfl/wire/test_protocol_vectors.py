"""The test vectors of PROTOCOL.md (``hierfl/wire/vectors.json``) are what this release computes and accepts.

They belong to a protocol version: a change here is a change of the protocol. The digests cover values, never Arrow's
framing, so the chunk's bytes are an example that every decoder must accept, not the only right encoding.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from hierfl import documents, encodings, errors, pki
from hierfl.aggregation import ColumnGroup, GroupKind, Weighting
from hierfl.identity import Identity, RoleName
from hierfl.layout import Layout, Role, TensorSpec, model_hash
from hierfl.metrics import STANDARD_METRICS, quantise_metrics
from hierfl.plan import DECLINE_CODES, PLAN_CONTEXT, Caps, ModelRef, Plan, TaskSpec, plan_statement, task_seed
from hierfl.receipts import Reason
from hierfl.records import UPDATE_CONTEXT, UpdateHead, update_statement
from hierfl.types import AttemptKey, ClientId, ClientRef, RegionId, RunId, SiteId, TaskKind, UpdateKey
from hierfl.wire import arrow, digest, rpc, tls, transfer
from hierfl.wire import header as header_rules
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire.access import ALLOWED
from hierfl.wire.status import to_status
from hierfl.wire.transfer import Expect, Incoming, Outgoing

WIRE = Path(transfer.__file__).parent
VECTORS = json.loads((WIRE / "vectors.json").read_text())
PROTOCOL = (WIRE / "PROTOCOL.md").read_text()

LAYOUT = Layout(
    (
        TensorSpec("fc.weight", (2, 2), "float32", Role.TRAIN),
        TensorSpec("bn.mean", (2,), "float32", Role.MEAN),
        TensorSpec("bn.count", (), "int64", Role.LOCAL),
        TensorSpec("fc.bias", (1,), "float32", Role.TRAIN),
    )
)
MODEL = {"train": np.array([0, 1, -2.5, 1e-3, 0.1], np.float32), "mean": np.array([0.5, 1e6], np.float32)}
DELTA = {"train": np.array([0.25, -1, 0, 3e-5, 7.5], np.float32), "mean": np.array([0, -0.5], np.float32)}
KEY = AttemptKey(RunId("digits-7f3a2b"), TaskKind.TRAIN, 3, 2)
CLIENT = ClientRef(RegionId("eu-west"), SiteId("site-00"), ClientId("client-00"))
GROUPS = (
    ColumnGroup(name="train", kind=GroupKind.FIXED, s=32, max_abs=8.0, weighting=Weighting.WEIGHT, num_values=5),
    ColumnGroup(name="mean", kind=GroupKind.WIDE, s=32, max_abs=2.0**20, weighting=Weighting.WEIGHT, num_values=2),
)
TASK = TaskSpec(
    kind=TaskKind.TRAIN,
    app="digits",
    app_version="1",
    config={"lr": 0.1, "epochs": 2},
    client_part={"proximal_mu": 0.0},
    groups=GROUPS,
    metrics=STANDARD_METRICS,
    evaluate=True,
)
MODEL_HASH = model_hash(LAYOUT, MODEL)
PLAN = Plan(
    federation="hospitals",
    region=CLIENT.region,
    run=KEY.run,
    round=KEY.round,
    attempt=KEY.attempt,
    seed=20260101,
    task=TASK,
    base=ModelRef(version=2, model_hash=MODEL_HASH, layout_hash=LAYOUT.hash, size_bytes=28),
    caps=Caps(max_weight=65_535, region_weight=2**26, max_upload_bytes=2**20),
    k=3,
    min_clients=3,
    report_timeout_s=300.0,
    hold_s=2592000.0,
)
METRICS = {"num_examples": 120.0, "train_loss_sum": 66.6}
HEAD = UpdateHead(
    weight=120,
    metrics=quantise_metrics(STANDARD_METRICS, METRICS),
    base_model_hash=MODEL_HASH,
    task_hash=TASK.hash,
)
ENCODINGS = {"bfloat16": {}, "int8": {"block": 16}, "topk": {"fraction": 0.4}}
LEADER_EPOCH = 7
TICKET = bytes(range(16))
TEST_KEY = ec.derive_private_key(0x5EED, ec.SECP256R1())


def update(digest_alg: str = "blake3") -> Outgoing:
    return Outgoing("update", LAYOUT.hash, DELTA, meta=documents.encode(HEAD), digest_alg=digest_alg)


def chunk(values: np.ndarray) -> dict[str, object]:
    digests = {}
    for alg in sorted(digest.ALGORITHMS):
        state = digest.new(alg)
        state.update(values.tobytes())
        digests[alg] = state.hexdigest()
    return {
        "dtype": values.dtype.name,
        "values": values.tolist(),
        "values_hex": values.tobytes().hex(),
        "frame_hex": arrow.encode_chunk(values).hex(),
        "digests": digests,
    }


def encoded(name: str, options: dict[str, object]) -> dict[str, object]:
    """What ``train`` of the update is on the wire, and what it stands for there."""
    encoding, (group, _) = encodings.get(name, options), GROUPS
    wire = encoding.encode(group, DELTA["train"], task_seed(PLAN.seed, PLAN.round, CLIENT))
    decoded = encoding.decode(group, {vector: [values] for vector, values in wire.items()})
    sums = np.zeros(group.num_values, np.int64)
    assert encoding.fold(sums, group, {vector: [values] for vector, values in wire.items()}, HEAD.weight)
    return {
        "encoding": json.loads(documents.encode(encodings.spec(name, options))),
        "vectors": {
            vector: {"dtype": values.dtype.name, "values": values.tolist(), "values_hex": values.tobytes().hex()}
            for vector, values in wire.items()
        },
        "decoded_hex": decoded.tobytes().hex(),
        "sums": sums.tolist(),
    }


def signed(context: bytes, message: bytes) -> dict[str, str]:
    payload = b"hierfl-signature\0" + context + b"\0" + message
    return {"context": context.decode(), "message_hex": message.hex(), "signed_hex": payload.hex()}


def computed() -> dict[str, object]:
    """What the file holds, but for its two signatures."""
    sent = update()
    header, *_, trailer = sent.frames(KEY, TICKET)
    statement = update_statement(UpdateKey(KEY, CLIENT), sent.digest, HEAD.weight)
    server = Identity("hospitals", RoleName.COMBINER, region="eu-west")
    return {
        "protocol_version": 1,
        "layout": {"json": LAYOUT.to_bytes().decode(), "hash": LAYOUT.hash, "vectors": dict(LAYOUT.vectors)},
        "model": {
            "vectors": {name: vector.tobytes().hex() for name, vector in MODEL.items()},
            "model_hash": MODEL_HASH,
        },
        "chunks": [chunk(DELTA["train"]), chunk(np.array([-1, 0, 2**40], np.int64))],
        "plan": {
            "json": PLAN.to_bytes().decode(),
            "task_hash": TASK.hash,
            "leader_epoch": LEADER_EPOCH,
            **signed(PLAN_CONTEXT, plan_statement(LEADER_EPOCH, PLAN.to_bytes())),
        },
        "task_seed": {
            "seed": PLAN.seed,
            "round": PLAN.round,
            "site": CLIENT.site,
            "client": CLIENT.client,
            "task_seed": task_seed(PLAN.seed, PLAN.round, CLIENT),
        },
        "metrics": {"values": METRICS, "quantised": dict(HEAD.metrics)},
        "update": {
            "head": documents.encode(HEAD).decode(),
            "descriptor": documents.encode(sent.descriptor).decode(),
            "header": header.decode(),
            "trailer": trailer.decode(),
            "digest": sent.digest,
            "digest_with_sha256": update("sha256").digest,
            "statement": statement.decode(),
            **signed(UPDATE_CONTEXT, statement),
        },
        "encodings": [encoded(choice, options) for choice, options in ENCODINGS.items()],
        "public_key_hex": public_point().hex(),
        "channel_options": dict(tls.channel_options(server)),
    }


def public_point() -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return TEST_KEY.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def fixed(part: object) -> object:
    """All but what may differ from one release of a library, or one signing, to the next."""
    if isinstance(part, dict):
        return {name: fixed(value) for name, value in part.items() if name not in {"frame_hex", "signature_hex"}}
    return [fixed(value) for value in part] if isinstance(part, list) else part


def test_the_vectors_are_what_this_release_computes():
    assert fixed(VECTORS) == fixed(json.loads(json.dumps(computed())))


@pytest.mark.parametrize("part", ["plan", "update"])
def test_the_signatures_in_the_vectors_are_accepted(part):
    document = VECTORS[part]
    signature, message = bytes.fromhex(document["signature_hex"]), bytes.fromhex(document["message_hex"])
    pki.verify(TEST_KEY.public_key(), signature, message, document["context"].encode())
    with pytest.raises(errors.CertificateUntrusted):
        pki.verify(TEST_KEY.public_key(), signature, message + b"x", document["context"].encode())


def test_a_stranger_who_builds_the_frames_from_the_vectors_is_understood():
    frames = [
        VECTORS["update"]["header"].encode(),
        bytes.fromhex(VECTORS["chunks"][0]["frame_hex"]),
        arrow.encode_chunk(DELTA["mean"]),
        VECTORS["update"]["trailer"].encode(),
    ]
    incoming = Incoming(Expect("update", LAYOUT.hash, update().descriptor.vectors, 2**20, VECTORS["update"]["digest"]))
    for frame in frames:
        incoming.feed(frame)
    incoming.close()
    assert incoming.header.key == KEY
    assert incoming.header.ticket_bytes == TICKET
    assert documents.decode(incoming.meta, UpdateHead, "head") == HEAD


@pytest.mark.parametrize("index", [0, 1])
def test_the_chunks_of_the_vectors_decode(index):
    vector = VECTORS["chunks"][index]
    values = arrow.decode_chunk(bytes.fromhex(vector["frame_hex"]), vector["dtype"], len(vector["values"]))
    assert values.tobytes().hex() == vector["values_hex"]


def test_the_task_stands_in_the_plan_as_it_is_hashed():
    assert documents.encode(TASK).decode() in VECTORS["plan"]["json"]
    assert Plan.from_bytes(VECTORS["plan"]["json"].encode()) == PLAN


# ---------------------------------------------------------------- the document


def quoted(pattern: str) -> set[str]:
    return set(re.findall(pattern, PROTOCOL))


def test_every_long_hex_string_of_the_document_is_of_the_vectors():
    known = json.dumps(VECTORS)
    strings = quoted(r"[0-9a-f]{40,}")
    assert strings
    assert all(text in known for text in strings)


def test_the_document_names_every_rpc_of_a_client():
    services = pb.DESCRIPTOR.services_by_name
    for name in ("CombinerService", "ControllerService", "OperatorService", "RegionOperatorService"):
        assert f"`{name}`" in PROTOCOL
    for method in services["CombinerService"].methods:
        assert f"`{method.name}`" in PROTOCOL
    assert {method.rpartition("/")[2] for method in ALLOWED} >= {m.name for m in services["CombinerService"].methods}


def test_the_document_lists_every_code_a_client_sends_or_is_told():
    for code in DECLINE_CODES | {reason.value for reason in Reason}:
        assert f"`{code}`" in PROTOCOL, code


def test_the_documents_table_of_errors_is_the_one_that_servers_use():
    rows = dict(re.findall(r"^\| `(HFL-\d+)` \| `([A-Z_]+)` \|", PROTOCOL, re.MULTILINE))
    classes = {kind.code: kind for name in errors.__all__ if issubclass(kind := getattr(errors, name), Exception)}
    assert {code for code, kind in classes.items() if issubclass(kind, errors.WireError)} <= set(rows)
    for code, status in rows.items():
        kind = classes[code]
        made = kind.__new__(kind)
        made.args = ("x",)
        if issubclass(kind, errors.NotFound):
            made = errors.NotFound("run", "x")
        if kind is errors.ComeBack:
            made = errors.ComeBack("x", 1.0)
        assert to_status(made).code.name == status, code


def test_the_documents_limits_are_those_of_the_code():
    limits = {
        "A gRPC message": tls.MAX_MESSAGE_BYTES,
        "A chunk": arrow.CHUNK_BYTES,
        "A part of a header": header_rules.HEADER_PART_BYTES,
        "A header": header_rules.MAX_HEADER_BYTES,
        "Vectors of a transfer": header_rules.MAX_VECTORS,
        "A chunk's metadata": arrow.MAX_METADATA_BYTES,
        "A ticket": header_rules.MAX_TICKET_BYTES,
        "A trailer": header_rules.MAX_TRAILER_BYTES,
        "Silence within a transfer": int(rpc.SILENCE_S),
    }
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([\d,]+)[^|]*\|$", PROTOCOL, re.MULTILINE))
    assert {name: int(rows[name].replace(",", "")) for name in limits} == limits


def test_the_document_shows_the_channel_options():
    for name, value in VECTORS["channel_options"].items():
        shown = "the target name" if name == "grpc.ssl_target_name_override" else f"{value:,}"
        assert re.search(rf"^\| `{re.escape(name)}` \| {re.escape(shown)}", PROTOCOL, re.MULTILINE), name


def test_the_go_ahead_of_an_upload_is_documented():
    assert all(f"`{part}`" in PROTOCOL for part in rpc.GO_ON)
