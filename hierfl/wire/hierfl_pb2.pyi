from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TaskKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_KIND_UNSPECIFIED: _ClassVar[TaskKind]
    TASK_KIND_TRAIN: _ClassVar[TaskKind]
    TASK_KIND_EVALUATE: _ClassVar[TaskKind]

class ReceiptState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RECEIPT_STATE_UNSPECIFIED: _ClassVar[ReceiptState]
    RECEIPT_STATE_UNKNOWN: _ClassVar[ReceiptState]
    RECEIPT_STATE_STAGED: _ClassVar[ReceiptState]
    RECEIPT_STATE_SEALED: _ClassVar[ReceiptState]
    RECEIPT_STATE_COMMITTED: _ClassVar[ReceiptState]
    RECEIPT_STATE_NOT_COUNTED: _ClassVar[ReceiptState]
TASK_KIND_UNSPECIFIED: TaskKind
TASK_KIND_TRAIN: TaskKind
TASK_KIND_EVALUATE: TaskKind
RECEIPT_STATE_UNSPECIFIED: ReceiptState
RECEIPT_STATE_UNKNOWN: ReceiptState
RECEIPT_STATE_STAGED: ReceiptState
RECEIPT_STATE_SEALED: ReceiptState
RECEIPT_STATE_COMMITTED: ReceiptState
RECEIPT_STATE_NOT_COUNTED: ReceiptState

class RawFrame(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ("versions", "software")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedScalarFieldContainer[int]
    software: str
    def __init__(self, versions: _Optional[_Iterable[int]] = ..., software: _Optional[str] = ...) -> None: ...

class HelloResponse(_message.Message):
    __slots__ = ("version", "software", "time_unix_ns")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    TIME_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    version: int
    software: str
    time_unix_ns: int
    def __init__(self, version: _Optional[int] = ..., software: _Optional[str] = ..., time_unix_ns: _Optional[int] = ...) -> None: ...

class AttemptKey(_message.Message):
    __slots__ = ("run", "task", "round", "attempt")
    RUN_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    run: str
    task: TaskKind
    round: int
    attempt: int
    def __init__(self, run: _Optional[str] = ..., task: _Optional[_Union[TaskKind, str]] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("key", "leader_epoch", "plan", "signature", "certificate", "traceparent")
    KEY_FIELD_NUMBER: _ClassVar[int]
    LEADER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    key: AttemptKey
    leader_epoch: int
    plan: bytes
    signature: bytes
    certificate: bytes
    traceparent: str
    def __init__(self, key: _Optional[_Union[AttemptKey, _Mapping]] = ..., leader_epoch: _Optional[int] = ..., plan: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., certificate: _Optional[bytes] = ..., traceparent: _Optional[str] = ...) -> None: ...

class FetchModelRequest(_message.Message):
    __slots__ = ("model_hash", "from_chunk", "descriptor_digest", "bases")
    MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    FROM_CHUNK_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTOR_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BASES_FIELD_NUMBER: _ClassVar[int]
    model_hash: str
    from_chunk: int
    descriptor_digest: str
    bases: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model_hash: _Optional[str] = ..., from_chunk: _Optional[int] = ..., descriptor_digest: _Optional[str] = ..., bases: _Optional[_Iterable[str]] = ...) -> None: ...

class FollowRequest(_message.Message):
    __slots__ = ("apps", "endpoints_epoch", "endpoints_version", "takes_receipts_along", "takes_models_along")
    APPS_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_EPOCH_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    TAKES_RECEIPTS_ALONG_FIELD_NUMBER: _ClassVar[int]
    TAKES_MODELS_ALONG_FIELD_NUMBER: _ClassVar[int]
    apps: _containers.RepeatedCompositeFieldContainer[App]
    endpoints_epoch: int
    endpoints_version: int
    takes_receipts_along: bool
    takes_models_along: bool
    def __init__(self, apps: _Optional[_Iterable[_Union[App, _Mapping]]] = ..., endpoints_epoch: _Optional[int] = ..., endpoints_version: _Optional[int] = ..., takes_receipts_along: _Optional[bool] = ..., takes_models_along: _Optional[bool] = ...) -> None: ...

class App(_message.Message):
    __slots__ = ("name", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class FollowResponse(_message.Message):
    __slots__ = ("offer", "receipt", "withdrawal", "welcome", "endpoints", "receipts", "model")
    OFFER_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWAL_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    offer: Offer
    receipt: Receipt
    withdrawal: Withdrawal
    welcome: Welcome
    endpoints: Endpoints
    receipts: _containers.RepeatedCompositeFieldContainer[Receipt]
    model: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, offer: _Optional[_Union[Offer, _Mapping]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ..., withdrawal: _Optional[_Union[Withdrawal, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., endpoints: _Optional[_Union[Endpoints, _Mapping]] = ..., receipts: _Optional[_Iterable[_Union[Receipt, _Mapping]]] = ..., model: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("incarnation", "endpoints", "intake")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    INTAKE_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    endpoints: Endpoints
    intake: str
    def __init__(self, incarnation: _Optional[str] = ..., endpoints: _Optional[_Union[Endpoints, _Mapping]] = ..., intake: _Optional[str] = ...) -> None: ...

class Endpoints(_message.Message):
    __slots__ = ("document", "signature", "certificate")
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    document: bytes
    signature: bytes
    certificate: bytes
    def __init__(self, document: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., certificate: _Optional[bytes] = ...) -> None: ...

class Withdrawal(_message.Message):
    __slots__ = ("key", "reason")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    key: AttemptKey
    reason: str
    def __init__(self, key: _Optional[_Union[AttemptKey, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class AdmitRequest(_message.Message):
    __slots__ = ("key", "digest", "length_bytes", "weight", "signature", "update")
    KEY_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    LENGTH_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    key: AttemptKey
    digest: str
    length_bytes: int
    weight: int
    signature: bytes
    update: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, key: _Optional[_Union[AttemptKey, _Mapping]] = ..., digest: _Optional[str] = ..., length_bytes: _Optional[int] = ..., weight: _Optional[int] = ..., signature: _Optional[bytes] = ..., update: _Optional[_Iterable[bytes]] = ...) -> None: ...

class AdmitResponse(_message.Message):
    __slots__ = ("ticket", "receipt", "retry_after_ms")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    receipt: Receipt
    retry_after_ms: int
    def __init__(self, ticket: _Optional[bytes] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class UploadResponse(_message.Message):
    __slots__ = ("receipt",)
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    receipt: Receipt
    def __init__(self, receipt: _Optional[_Union[Receipt, _Mapping]] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("key", "digest", "state", "model_version", "reason")
    KEY_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    key: AttemptKey
    digest: str
    state: ReceiptState
    model_version: int
    reason: str
    def __init__(self, key: _Optional[_Union[AttemptKey, _Mapping]] = ..., digest: _Optional[str] = ..., state: _Optional[_Union[ReceiptState, str]] = ..., model_version: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class DeclineRequest(_message.Message):
    __slots__ = ("key", "code")
    KEY_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    key: AttemptKey
    code: str
    def __init__(self, key: _Optional[_Union[AttemptKey, _Mapping]] = ..., code: _Optional[str] = ...) -> None: ...

class DeclineResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetReceiptsRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[AttemptKey]
    def __init__(self, keys: _Optional[_Iterable[_Union[AttemptKey, _Mapping]]] = ...) -> None: ...

class GetReceiptsResponse(_message.Message):
    __slots__ = ("receipts",)
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    receipts: _containers.RepeatedCompositeFieldContainer[Receipt]
    def __init__(self, receipts: _Optional[_Iterable[_Union[Receipt, _Mapping]]] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("region_epoch", "store_id", "capacity", "leader_epoch", "pending")
    REGION_EPOCH_FIELD_NUMBER: _ClassVar[int]
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    LEADER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    region_epoch: int
    store_id: str
    capacity: int
    leader_epoch: int
    pending: _containers.RepeatedCompositeFieldContainer[PendingPartial]
    def __init__(self, region_epoch: _Optional[int] = ..., store_id: _Optional[str] = ..., capacity: _Optional[int] = ..., leader_epoch: _Optional[int] = ..., pending: _Optional[_Iterable[_Union[PendingPartial, _Mapping]]] = ...) -> None: ...

class PendingPartial(_message.Message):
    __slots__ = ("key", "digest")
    KEY_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    key: AttemptKey
    digest: str
    def __init__(self, key: _Optional[_Union[AttemptKey, _Mapping]] = ..., digest: _Optional[str] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("attached", "offer", "verdict", "withdrawal")
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWAL_FIELD_NUMBER: _ClassVar[int]
    attached: Attached
    offer: Offer
    verdict: Verdict
    withdrawal: Withdrawal
    def __init__(self, attached: _Optional[_Union[Attached, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., verdict: _Optional[_Union[Verdict, _Mapping]] = ..., withdrawal: _Optional[_Union[Withdrawal, _Mapping]] = ...) -> None: ...

class Attached(_message.Message):
    __slots__ = ("leader_epoch", "report_every_s", "silence_s")
    LEADER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    REPORT_EVERY_S_FIELD_NUMBER: _ClassVar[int]
    SILENCE_S_FIELD_NUMBER: _ClassVar[int]
    leader_epoch: int
    report_every_s: float
    silence_s: float
    def __init__(self, leader_epoch: _Optional[int] = ..., report_every_s: _Optional[float] = ..., silence_s: _Optional[float] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("key", "leader_epoch", "committed", "partial_digest", "model_version", "record", "signature", "certificate", "reason")
    KEY_FIELD_NUMBER: _ClassVar[int]
    LEADER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    key: AttemptKey
    leader_epoch: int
    committed: bool
    partial_digest: str
    model_version: int
    record: bytes
    signature: bytes
    certificate: bytes
    reason: str
    def __init__(self, key: _Optional[_Union[AttemptKey, _Mapping]] = ..., leader_epoch: _Optional[int] = ..., committed: _Optional[bool] = ..., partial_digest: _Optional[str] = ..., model_version: _Optional[int] = ..., record: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., certificate: _Optional[bytes] = ..., reason: _Optional[str] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("region_epoch", "progress", "clients_connected", "sites_connected", "bytes_from_sites", "bytes_to_sites")
    REGION_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_CONNECTED_FIELD_NUMBER: _ClassVar[int]
    SITES_CONNECTED_FIELD_NUMBER: _ClassVar[int]
    BYTES_FROM_SITES_FIELD_NUMBER: _ClassVar[int]
    BYTES_TO_SITES_FIELD_NUMBER: _ClassVar[int]
    region_epoch: int
    progress: _containers.RepeatedCompositeFieldContainer[AttemptProgress]
    clients_connected: int
    sites_connected: int
    bytes_from_sites: int
    bytes_to_sites: int
    def __init__(self, region_epoch: _Optional[int] = ..., progress: _Optional[_Iterable[_Union[AttemptProgress, _Mapping]]] = ..., clients_connected: _Optional[int] = ..., sites_connected: _Optional[int] = ..., bytes_from_sites: _Optional[int] = ..., bytes_to_sites: _Optional[int] = ...) -> None: ...

class AttemptProgress(_message.Message):
    __slots__ = ("key", "phase", "clients_ready", "clients_reported", "cohort")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_READY_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_REPORTED_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    key: AttemptKey
    phase: str
    clients_ready: int
    clients_reported: int
    cohort: int
    def __init__(self, key: _Optional[_Union[AttemptKey, _Mapping]] = ..., phase: _Optional[str] = ..., clients_ready: _Optional[int] = ..., clients_reported: _Optional[int] = ..., cohort: _Optional[int] = ...) -> None: ...

class ReportResponse(_message.Message):
    __slots__ = ("leader_epoch",)
    LEADER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    leader_epoch: int
    def __init__(self, leader_epoch: _Optional[int] = ...) -> None: ...

class AbstainRequest(_message.Message):
    __slots__ = ("key", "region_epoch", "code")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REGION_EPOCH_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    key: AttemptKey
    region_epoch: int
    code: str
    def __init__(self, key: _Optional[_Union[AttemptKey, _Mapping]] = ..., region_epoch: _Optional[int] = ..., code: _Optional[str] = ...) -> None: ...

class AbstainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UplinkResponse(_message.Message):
    __slots__ = ("key", "digest", "countersignature", "certificate")
    KEY_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    COUNTERSIGNATURE_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    key: AttemptKey
    digest: str
    countersignature: bytes
    certificate: bytes
    def __init__(self, key: _Optional[_Union[AttemptKey, _Mapping]] = ..., digest: _Optional[str] = ..., countersignature: _Optional[bytes] = ..., certificate: _Optional[bytes] = ...) -> None: ...

class UploadModelResponse(_message.Message):
    __slots__ = ("model_hash", "layout_hash")
    MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_HASH_FIELD_NUMBER: _ClassVar[int]
    model_hash: str
    layout_hash: str
    def __init__(self, model_hash: _Optional[str] = ..., layout_hash: _Optional[str] = ...) -> None: ...

class SubmitRunRequest(_message.Message):
    __slots__ = ("job", "model_hash", "request_id")
    JOB_FIELD_NUMBER: _ClassVar[int]
    MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    job: bytes
    model_hash: str
    request_id: str
    def __init__(self, job: _Optional[bytes] = ..., model_hash: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class SubmitRunResponse(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class ListRunsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRunsResponse(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[RunSummary]
    def __init__(self, runs: _Optional[_Iterable[_Union[RunSummary, _Mapping]]] = ...) -> None: ...

class RunSummary(_message.Message):
    __slots__ = ("run", "name", "state", "reason", "rounds_committed", "rounds_abandoned", "rounds_planned", "model_version", "model_hash", "submitted_unix_ns", "ended_unix_ns", "app", "strategy", "exact_in_two_tiers", "updates")
    RUN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_ABANDONED_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_PLANNED_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    SUBMITTED_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    ENDED_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    APP_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    EXACT_IN_TWO_TIERS_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    run: str
    name: str
    state: str
    reason: str
    rounds_committed: int
    rounds_abandoned: int
    rounds_planned: int
    model_version: int
    model_hash: str
    submitted_unix_ns: int
    ended_unix_ns: int
    app: str
    strategy: str
    exact_in_two_tiers: bool
    updates: str
    def __init__(self, run: _Optional[str] = ..., name: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., rounds_committed: _Optional[int] = ..., rounds_abandoned: _Optional[int] = ..., rounds_planned: _Optional[int] = ..., model_version: _Optional[int] = ..., model_hash: _Optional[str] = ..., submitted_unix_ns: _Optional[int] = ..., ended_unix_ns: _Optional[int] = ..., app: _Optional[str] = ..., strategy: _Optional[str] = ..., exact_in_two_tiers: _Optional[bool] = ..., updates: _Optional[str] = ...) -> None: ...

class GetRunRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class GetRunResponse(_message.Message):
    __slots__ = ("summary", "rounds", "job")
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    summary: RunSummary
    rounds: _containers.RepeatedCompositeFieldContainer[RoundSummary]
    job: bytes
    def __init__(self, summary: _Optional[_Union[RunSummary, _Mapping]] = ..., rounds: _Optional[_Iterable[_Union[RoundSummary, _Mapping]]] = ..., job: _Optional[bytes] = ...) -> None: ...

class RoundSummary(_message.Message):
    __slots__ = ("round", "attempts", "task", "model_version", "model_hash", "weight", "num_sites", "num_updates", "metrics", "seconds", "regions", "committed_unix_ns")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    NUM_SITES_FIELD_NUMBER: _ClassVar[int]
    NUM_UPDATES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    round: int
    attempts: int
    task: TaskKind
    model_version: int
    model_hash: str
    weight: int
    num_sites: int
    num_updates: int
    metrics: _containers.ScalarMap[str, float]
    seconds: float
    regions: _containers.RepeatedCompositeFieldContainer[RegionShare]
    committed_unix_ns: int
    def __init__(self, round: _Optional[int] = ..., attempts: _Optional[int] = ..., task: _Optional[_Union[TaskKind, str]] = ..., model_version: _Optional[int] = ..., model_hash: _Optional[str] = ..., weight: _Optional[int] = ..., num_sites: _Optional[int] = ..., num_updates: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., seconds: _Optional[float] = ..., regions: _Optional[_Iterable[_Union[RegionShare, _Mapping]]] = ..., committed_unix_ns: _Optional[int] = ...) -> None: ...

class RegionShare(_message.Message):
    __slots__ = ("region", "weight", "num_sites", "num_updates", "bytes_out", "collected_in")
    REGION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    NUM_SITES_FIELD_NUMBER: _ClassVar[int]
    NUM_UPDATES_FIELD_NUMBER: _ClassVar[int]
    BYTES_OUT_FIELD_NUMBER: _ClassVar[int]
    COLLECTED_IN_FIELD_NUMBER: _ClassVar[int]
    region: str
    weight: int
    num_sites: int
    num_updates: int
    bytes_out: int
    collected_in: str
    def __init__(self, region: _Optional[str] = ..., weight: _Optional[int] = ..., num_sites: _Optional[int] = ..., num_updates: _Optional[int] = ..., bytes_out: _Optional[int] = ..., collected_in: _Optional[str] = ...) -> None: ...

class FollowRunRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class FollowRunResponse(_message.Message):
    __slots__ = ("summary", "round", "attempt", "phase", "waiting_for", "regions", "committed")
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    summary: RunSummary
    round: int
    attempt: int
    phase: str
    waiting_for: str
    regions: _containers.RepeatedCompositeFieldContainer[RegionProgress]
    committed: RoundSummary
    def __init__(self, summary: _Optional[_Union[RunSummary, _Mapping]] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., phase: _Optional[str] = ..., waiting_for: _Optional[str] = ..., regions: _Optional[_Iterable[_Union[RegionProgress, _Mapping]]] = ..., committed: _Optional[_Union[RoundSummary, _Mapping]] = ...) -> None: ...

class RegionProgress(_message.Message):
    __slots__ = ("region", "phase", "clients_ready", "clients_reported", "clients_needed")
    REGION_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_READY_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_REPORTED_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_NEEDED_FIELD_NUMBER: _ClassVar[int]
    region: str
    phase: str
    clients_ready: int
    clients_reported: int
    clients_needed: int
    def __init__(self, region: _Optional[str] = ..., phase: _Optional[str] = ..., clients_ready: _Optional[int] = ..., clients_reported: _Optional[int] = ..., clients_needed: _Optional[int] = ...) -> None: ...

class CancelRunRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class CancelRunResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: str
    def __init__(self, state: _Optional[str] = ...) -> None: ...

class ResumeRunRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class ResumeRunResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: str
    def __init__(self, state: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("run", "version", "model_hash", "layout_hash", "num_params", "size_bytes", "committed_unix_ns", "layout", "approximate_across_regions")
    RUN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_HASH_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    APPROXIMATE_ACROSS_REGIONS_FIELD_NUMBER: _ClassVar[int]
    run: str
    version: int
    model_hash: str
    layout_hash: str
    num_params: int
    size_bytes: int
    committed_unix_ns: int
    layout: bytes
    approximate_across_regions: bool
    def __init__(self, run: _Optional[str] = ..., version: _Optional[int] = ..., model_hash: _Optional[str] = ..., layout_hash: _Optional[str] = ..., num_params: _Optional[int] = ..., size_bytes: _Optional[int] = ..., committed_unix_ns: _Optional[int] = ..., layout: _Optional[bytes] = ..., approximate_across_regions: _Optional[bool] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("federation", "leader_epoch", "regions", "runs")
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    LEADER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    federation: str
    leader_epoch: int
    regions: _containers.RepeatedCompositeFieldContainer[RegionStatus]
    runs: _containers.RepeatedCompositeFieldContainer[RunSummary]
    def __init__(self, federation: _Optional[str] = ..., leader_epoch: _Optional[int] = ..., regions: _Optional[_Iterable[_Union[RegionStatus, _Mapping]]] = ..., runs: _Optional[_Iterable[_Union[RunSummary, _Mapping]]] = ...) -> None: ...

class RegionStatus(_message.Message):
    __slots__ = ("region", "state", "region_epoch", "silent_for_s", "clients_connected", "sites_connected", "bytes_from_sites", "bytes_to_sites")
    REGION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REGION_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SILENT_FOR_S_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_CONNECTED_FIELD_NUMBER: _ClassVar[int]
    SITES_CONNECTED_FIELD_NUMBER: _ClassVar[int]
    BYTES_FROM_SITES_FIELD_NUMBER: _ClassVar[int]
    BYTES_TO_SITES_FIELD_NUMBER: _ClassVar[int]
    region: str
    state: str
    region_epoch: int
    silent_for_s: float
    clients_connected: int
    sites_connected: int
    bytes_from_sites: int
    bytes_to_sites: int
    def __init__(self, region: _Optional[str] = ..., state: _Optional[str] = ..., region_epoch: _Optional[int] = ..., silent_for_s: _Optional[float] = ..., clients_connected: _Optional[int] = ..., sites_connected: _Optional[int] = ..., bytes_from_sites: _Optional[int] = ..., bytes_to_sites: _Optional[int] = ...) -> None: ...

class ListClientsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListClientsResponse(_message.Message):
    __slots__ = ("clients",)
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    clients: _containers.RepeatedCompositeFieldContainer[ConnectedClient]
    def __init__(self, clients: _Optional[_Iterable[_Union[ConnectedClient, _Mapping]]] = ...) -> None: ...

class ConnectedClient(_message.Message):
    __slots__ = ("site", "client", "apps", "state", "connected_for_s")
    SITE_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    APPS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FOR_S_FIELD_NUMBER: _ClassVar[int]
    site: str
    client: str
    apps: _containers.RepeatedCompositeFieldContainer[App]
    state: str
    connected_for_s: float
    def __init__(self, site: _Optional[str] = ..., client: _Optional[str] = ..., apps: _Optional[_Iterable[_Union[App, _Mapping]]] = ..., state: _Optional[str] = ..., connected_for_s: _Optional[float] = ...) -> None: ...
