"""Services and stubs over real gRPC and TLS: bulk frames untouched, errors by name, deadlines, traces."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from hierfl import observe
from hierfl.certificates import TrustStore, issue_leaf, make_ca, make_key
from hierfl.errors import (
    DigestMismatch,
    LayoutMismatch,
    NotFound,
    RoundClosed,
    TransferIncomplete,
    Unreachable,
    VersionMismatch,
    WireError,
)
from hierfl.identity import Identity, RoleName
from hierfl.layout import Layout, model_hash
from hierfl.pki import Kit
from hierfl.receipts import Receipt, ReceiptState
from hierfl.types import AttemptKey, ClientRef, RunId, TaskKind, UpdateKey
from hierfl.wire import hierfl_pb2 as pb
from hierfl.wire import rpc, tls, transfer
from hierfl.wire.access import AccessInterceptor, current_identity
from hierfl.wire.convert import check_key, key_from_proto, key_to_proto, receipt_from_proto, receipt_to_proto
from hierfl.wire.fetch import fetch_model, model_frames
from hierfl.wire.models import hash_of
from hierfl.wire.transfer import Expect, Incoming, Outgoing
from hierfl.wire.versions import negotiate

KEY = AttemptKey(RunId("run-1"), TaskKind.TRAIN, 3, 1)
SERVER = Identity("fed", RoleName.COMBINER, region="eu")
CLIENT = Identity("fed", RoleName.CLIENT, region="eu", site="site-00", client="client-00")
REF = CLIENT.client_ref


def model(num_values: int = 300_000) -> tuple[Layout, dict[str, np.ndarray]]:
    params = {"fc.weight": np.arange(num_values, dtype=np.float32), "fc.bias": np.ones(3, np.float32)}
    layout = Layout.of(params)
    return layout, layout.flatten(params)


class Combiner:
    """A combiner's service as small as it can be: serves one model, takes one update."""

    def __init__(self) -> None:
        layout, vectors = model()
        self.layout, self.model_hash = layout, model_hash(layout, vectors)
        self.model = Outgoing("model", layout.hash, vectors, meta=layout.to_bytes())
        self.metadata: dict[str, object] = {}
        self.received: Incoming | None = None
        self.header: transfer.Header | None = None
        self.versions = (1,)
        self.clock_apart_s = 0
        self.silence_s = 5.0
        self.closed = False
        self.failure: Exception | None = None

    async def Hello(self, request, context):  # noqa: N802  the RPC's own name
        self.metadata = dict(context.invocation_metadata())
        if self.versions == (1,):
            answer = rpc.answer_hello(request)
            answer.time_unix_ns += self.clock_apart_s * 10**9
            return answer
        negotiate(self.versions, request.versions, our_name="the combiner", their_name="this client")
        return pb.HelloResponse(version=max(self.versions))

    async def Follow(self, request, context):  # noqa: N802
        yield pb.FollowResponse(welcome=pb.Welcome(incarnation=current_identity().client))

    async def Admit(self, request, context):  # noqa: N802
        await asyncio.Event().wait()

    async def Upload(self, frames, context):  # noqa: N802
        if self.closed:
            raise RoundClosed("the round is over")
        try:
            header = await rpc.first_frame(frames, self.silence_s)
            self.header = transfer.read_header(header)
            self.received = Incoming(Expect("update", None, None, 2**30))
            self.received.feed(header)
            await rpc.frames_of(frames, self.received, self.silence_s)
        except Exception as error:
            self.failure = error
            raise
        receipt = Receipt(key=UpdateKey(KEY, REF), digest=self.received.digest, state=ReceiptState.STAGED)
        return pb.UploadResponse(receipt=receipt_to_proto(receipt))

    async def Decline(self, request, context):  # noqa: N802
        return pb.DeclineResponse()

    async def GetReceipts(self, request, context):  # noqa: N802
        await asyncio.Event().wait()

    async def FetchModel(self, request, context):  # noqa: N802
        if request.model_hash == "0" * 64:
            raise NotFound("model", request.model_hash[:12])
        async for frame in model_frames(self.model.frames(), request, context):
            yield frame


@asynccontextmanager
async def serving(servicer: object) -> AsyncIterator[rpc.Stub]:
    """A server with ``servicer`` and a client of it, under certificates of their own."""
    authority = make_ca("fed", "eu")
    trust = TrustStore("fed", {"eu": authority.certificate})
    kits = []
    for identity in (SERVER, CLIENT):
        key = make_key()
        kits.append(Kit(Path(), identity, issue_leaf(authority, identity, key.public_key()), key, trust))
    server = grpc.aio.server(interceptors=[AccessInterceptor(trust, SERVER)], options=tls.server_options())
    rpc.add_service(server, "CombinerService", servicer)
    address = f"127.0.0.1:{tls.bind(server, '127.0.0.1:0', tls.server_credentials(kits[0]))}"
    await server.start()
    channel = tls.open_channel(kits[1], address, SERVER)
    try:
        yield rpc.stub(channel, "CombinerService")
    finally:
        await channel.close()
        await server.stop(None)


def expecting_model(combiner: Combiner) -> Expect:
    return Expect("model", combiner.layout.hash, None, 2**30)


def update(num_values: int = 300_000) -> Outgoing:
    return Outgoing("update", "ab" * 32, {"train": np.arange(num_values, dtype=np.float32)}, meta=b"{}")


# ---------------------------------------------------------------- services and sessions


async def test_hello_agrees_on_a_version_and_the_handler_knows_its_caller():
    async with serving(Combiner()) as stub:
        assert await rpc.hello(stub, "the combiner of eu", "here:1") == 1
        events = [event async for event in stub.Follow(pb.FollowRequest())]
        assert events[0].welcome.incarnation == "client-00"


async def test_hello_without_a_version_in_common_says_which_side_to_upgrade():
    combiner = Combiner()
    combiner.versions = (2, 3)
    async with serving(combiner) as stub:
        with pytest.raises(VersionMismatch, match="combiner speaks protocol 2, 3, this client 1: upgrade this client"):
            await rpc.hello(stub, "the combiner of eu", "here:1")


@pytest.mark.parametrize(("apart_s", "said"), [(3600, "1:00:00 behind"), (-2 * 86_400, "2 days, 0:00:00 ahead of")])
async def test_a_clock_that_is_far_from_the_servers_gets_a_warning(caplog, apart_s, said):
    combiner = Combiner()
    combiner.clock_apart_s = apart_s
    async with serving(combiner) as stub:
        await rpc.hello(stub, "the combiner of eu", "here:1")
    (record,) = caplog.records
    assert record.getMessage().startswith(f"this machine's clock is {said} that of the combiner of eu at here:1")


def test_clocks_that_are_a_little_apart_or_not_said_are_nothing_to_talk_about():
    now = 1_700_000_000 * 10**9
    assert rpc.clocks_apart(now, now + 59 * 10**9) == rpc.clocks_apart(now, 0) == ""


def test_versions_are_negotiated_downwards():
    names = {"our_name": "us", "their_name": "them"}
    assert negotiate([1, 2], [2, 3], **names) == 2
    assert negotiate([1, 2], [1, 2], **names) == 2
    with pytest.raises(VersionMismatch, match=r"us speaks protocol 3, 4, them 1: upgrade them"):
        negotiate([3, 4], [1], **names)
    with pytest.raises(VersionMismatch, match="upgrade us"):
        negotiate([1], [9], **names)
    with pytest.raises(VersionMismatch, match="them none"):
        negotiate([1], [], **names)


async def test_a_servicer_that_lacks_an_rpc_is_refused_at_start():
    class Half:
        async def Hello(self, request, context): ...  # noqa: N802

    with pytest.raises(TypeError, match="Half does not serve Follow, Admit, Upload, Decline, GetReceipts, FetchModel"):
        rpc.add_service(grpc.aio.server(), "CombinerService", Half())


async def test_a_stub_has_the_rpcs_of_its_service_only():
    async with serving(Combiner()) as stub:
        with pytest.raises(AttributeError, match="Uplink"):
            _ = stub.Uplink


async def test_bytes_that_are_no_message_harm_nobody_else():
    async with serving(Combiner()) as stub:
        garbage = pb.HelloRequest(versions=[255, 255])  # its first field reads as a key, and breaks off in it
        with pytest.raises(grpc.RpcError) as caught:
            await stub.Decline(garbage)
        assert isinstance(stub.error(caught.value), WireError)
        assert await rpc.hello(stub, "the combiner", "here:1") == 1


async def test_a_call_carries_the_trace_it_belongs_to(tmp_path):
    combiner = Combiner()
    observe.configure("client.site-00", tmp_path)
    try:
        async with serving(combiner) as stub:
            with observe.span(observe.SPAN_ROUND, run="run-1", round=1, task="train"):
                wanted = observe.traceparent()
                await rpc.hello(stub, "the combiner", "here:1")
    finally:
        observe.shutdown()
    assert combiner.metadata["traceparent"] == wanted


async def test_a_unary_call_ends_at_its_deadline():
    async with serving(Combiner()) as stub:
        with pytest.raises(grpc.RpcError) as caught:
            await stub.GetReceipts(pb.GetReceiptsRequest(), timeout=0.1)
        assert isinstance(stub.error(caught.value), Unreachable)


# ---------------------------------------------------------------- bulk


async def test_a_model_is_fetched_and_is_the_one_asked_for():
    combiner = Combiner()
    async with serving(combiner) as stub:
        got = await fetch_model(stub, combiner.model_hash, expecting_model(combiner))
    assert hash_of(got) == combiner.model_hash
    assert Layout.from_bytes(got.meta) == combiner.layout
    assert got.vectors()["train"].tobytes() == model()[1]["train"].tobytes()


async def test_many_clients_are_sent_the_same_encoded_copy():
    combiner = Combiner()
    async with serving(combiner) as stub:
        fetches = [fetch_model(stub, combiner.model_hash, expecting_model(combiner)) for _ in range(5)]
        digests = {got.digest for got in await asyncio.gather(*fetches)}
    assert digests == {combiner.model.digest}


async def test_another_model_than_asked_for_is_refused():
    combiner = Combiner()
    async with serving(combiner) as stub:
        with pytest.raises(DigestMismatch, match="was asked for"):
            await fetch_model(stub, "1" * 64, expecting_model(combiner))


async def test_a_model_that_contradicts_its_layout_is_refused():
    combiner = Combiner()
    layout, vectors = model(10)
    async with serving(combiner) as stub:
        combiner.model = Outgoing("model", "ab" * 32, vectors, meta=layout.to_bytes())
        with pytest.raises(LayoutMismatch, match="header says"):
            await fetch_model(stub, "1" * 64, Expect("model", None, None, 2**30))
        combiner.model = Outgoing("model", layout.hash, {"train": vectors["train"][:5]}, meta=layout.to_bytes())
        with pytest.raises(LayoutMismatch, match="vectors"):
            await fetch_model(stub, "1" * 64, Expect("model", None, None, 2**30))


async def test_a_model_that_is_not_there_says_so():
    combiner = Combiner()
    async with serving(combiner) as stub:
        with pytest.raises(NotFound, match="no model '000000000000'"):
            await fetch_model(stub, "0" * 64, expecting_model(combiner))


async def test_a_layout_above_one_message_travels_in_parts():
    params = {f"{index:05d}.{'x' * 1000}": np.full(1, index, np.float32) for index in range(4_200)}
    combiner = Combiner()
    combiner.layout = Layout.of(params)
    vectors = combiner.layout.flatten(params)
    combiner.model_hash = model_hash(combiner.layout, vectors)
    combiner.model = Outgoing("model", combiner.layout.hash, vectors, meta=combiner.layout.to_bytes())
    assert len(combiner.layout.to_bytes()) > tls.MAX_MESSAGE_BYTES
    async with serving(combiner) as stub:
        got = await fetch_model(stub, combiner.model_hash, expecting_model(combiner))
    assert Layout.from_bytes(got.meta) == combiner.layout


async def test_an_update_arrives_with_key_and_ticket_and_is_answered():
    combiner, sent = Combiner(), update()
    async with serving(combiner) as stub:
        response = await rpc.upload_frames(stub.Upload, sent, KEY, b"\x07\x08")
    receipt = receipt_from_proto(response.receipt, REF)
    assert receipt == Receipt(key=UpdateKey(KEY, REF), digest=sent.digest, state=ReceiptState.STAGED)
    assert combiner.header.key == KEY
    assert combiner.header.ticket_bytes == b"\x07\x08"
    assert [chunk.size for chunk in combiner.received.chunks["train"]] == [262_144, 37_856]


async def test_half_an_upload_is_incomplete_and_the_next_one_is_taken():
    combiner, sent = Combiner(), update()
    frames = list(sent.frames(KEY))
    async with serving(combiner) as stub:
        for count in (0, 1, 2, 3):
            with pytest.raises(grpc.RpcError) as caught:
                await rpc.send_frames(stub.Upload, frames[:count])
            assert isinstance(stub.error(caught.value), TransferIncomplete)
        await rpc.upload_frames(stub.Upload, sent, KEY)
    assert combiner.received.complete


async def test_a_sender_that_falls_silent_is_given_up():
    combiner, sent = Combiner(), update()
    combiner.silence_s = 0.2
    never = asyncio.Event()

    async def falls_silent() -> AsyncIterator[bytes]:
        yield next(sent.frames(KEY))
        await never.wait()

    async with serving(combiner) as stub:
        with pytest.raises(grpc.RpcError) as caught:
            await stub.Upload(falls_silent())
        assert isinstance(stub.error(caught.value), TransferIncomplete)
        assert "no frame came for 0.2 s" in str(combiner.failure)


@pytest.mark.parametrize("attempt", range(10))
async def test_a_refusal_reaches_a_client_that_has_much_to_send(attempt):
    combiner, sent = Combiner(), update(4_000_000)
    combiner.closed = True
    async with serving(combiner) as stub:
        with pytest.raises(RoundClosed, match="the round is over"):
            await rpc.upload_frames(stub.Upload, sent, KEY)


@pytest.mark.parametrize("attempt", range(5))
@pytest.mark.parametrize("what", ["a chunk", "a header", "its order", "its ticket"])
async def test_a_spoilt_upload_is_told_what_is_wrong_with_it(what, attempt):
    sent = update(4_000_000)
    frames = list(sent.frames(KEY))
    spoilt = {
        "a chunk": [*frames[:3], b"\xff" * 1_000_000, *frames[4:]],
        "a header": [b"{}", *frames[1:]],
        "its order": [frames[0], frames[-2], *frames[1:]],
        "its ticket": [frames[0].replace(b'"ticket":""', b'"ticket":"x"'), *frames[1:]],
    }
    async with serving(Combiner()) as stub:
        with pytest.raises(grpc.RpcError) as caught:
            await rpc.send_frames(stub.Upload, spoilt[what])
        assert isinstance(stub.error(caught.value), WireError)
        assert str(stub.error(caught.value)).startswith(("transfer", "chunk"))


async def test_a_header_that_is_refused_costs_no_more_than_itself():
    combiner, sent = Combiner(), update(4_000_000)
    combiner.closed = True
    taken: list[int] = []

    def counted():
        for frame in sent.frames(KEY):
            taken.append(len(frame))
            yield frame

    async with serving(combiner) as stub:
        with pytest.raises(grpc.RpcError):
            await rpc.send_frames(stub.Upload, counted())
    assert len(taken) == 1


async def test_frames_are_taken_from_any_stream():
    async def stream(frames) -> AsyncIterator[bytes]:
        for frame in frames:
            yield frame

    sent = update()
    incoming = Incoming(Expect("update", None, sent.descriptor.vectors, 2**30, sent.digest))
    await rpc.frames_of(stream(sent.frames()), incoming)
    assert incoming.digest == sent.digest
    with pytest.raises(WireError, match="more than 100"):
        await rpc.first_frame(stream(sent.frames()), max_bytes=100)
    with pytest.raises(WireError, match="not full"):
        await rpc.first_frame(stream([b"+", b"+"]))
    with pytest.raises(TransferIncomplete):
        await rpc.first_frame(stream([b"+" + b" " * 2**20]))


# ---------------------------------------------------------------- keys and receipts


def test_keys_survive_the_wire():
    for task in TaskKind:
        key = AttemptKey(RunId("digits-7f3a"), task, 2**32 - 1, 1)
        assert key_from_proto(key_to_proto(key)) == key


@pytest.mark.parametrize(
    "message",
    [
        pb.AttemptKey(),
        pb.AttemptKey(run="r", round=1, attempt=1),
        pb.AttemptKey(run="r", task=pb.TASK_KIND_TRAIN, round=0, attempt=1),
        pb.AttemptKey(run="r", task=pb.TASK_KIND_TRAIN, round=1, attempt=0),
        pb.AttemptKey(run="../x", task=pb.TASK_KIND_TRAIN, round=1, attempt=1),
        pb.AttemptKey(run="R\n", task=pb.TASK_KIND_TRAIN, round=1, attempt=1),
        pb.AttemptKey(run="r", task=77, round=1, attempt=1),
    ],
)
def test_keys_out_of_range_are_refused(message):
    with pytest.raises(WireError):
        key_from_proto(message)


def test_a_key_is_checked_as_it_is():
    assert check_key(KEY) is KEY
    with pytest.raises(WireError):
        check_key(AttemptKey(RunId("run-1"), TaskKind.TRAIN, 2**32, 1))


SHOWN = {
    ReceiptState.OFFERED: ReceiptState.OFFERED,
    ReceiptState.STAGED: ReceiptState.STAGED,
    ReceiptState.CLAIMED: ReceiptState.STAGED,
    ReceiptState.SEALED: ReceiptState.SEALED,
    ReceiptState.COMMITTED: ReceiptState.COMMITTED,
    ReceiptState.NOT_COUNTED: ReceiptState.NOT_COUNTED,
}


@pytest.mark.parametrize("state", ReceiptState)
def test_receipts_survive_the_wire_but_for_what_clients_need_not_know(state):
    receipt = Receipt(
        key=UpdateKey(KEY, REF),
        digest="blake3:" + "0" * 64,
        state=state,
        version=3 if state is ReceiptState.COMMITTED else 0,
        reason="late" if state is ReceiptState.NOT_COUNTED else "",
    )
    read = receipt_from_proto(receipt_to_proto(receipt), REF)
    assert read.state is SHOWN[state]
    assert (read.key, read.digest, read.version, read.reason) == (
        receipt.key,
        receipt.digest,
        receipt.version,
        receipt.reason,
    )


def test_an_unknown_update_needs_no_digest():
    message = pb.Receipt(key=key_to_proto(KEY), state=pb.RECEIPT_STATE_UNKNOWN)
    assert receipt_from_proto(message, REF).state is ReceiptState.OFFERED


@pytest.mark.parametrize(
    "changes",
    [
        {"state": pb.RECEIPT_STATE_UNSPECIFIED},
        {"state": 99},
        {"digest": ""},
        {"digest": "blake3:xy"},
        {"model_version": 3},
        {"reason": "late"},
        {"state": pb.RECEIPT_STATE_COMMITTED},
        {"state": pb.RECEIPT_STATE_NOT_COUNTED},
        {"state": pb.RECEIPT_STATE_NOT_COUNTED, "reason": "Some words."},
    ],
)
def test_receipts_that_contradict_themselves_are_refused(changes):
    message = pb.Receipt(key=key_to_proto(KEY), digest="blake3:" + "0" * 64, state=pb.RECEIPT_STATE_STAGED)
    for name, value in changes.items():
        setattr(message, name, value)
    with pytest.raises(WireError):
        receipt_from_proto(message, ClientRef("eu", "site-00", "client-00"))
