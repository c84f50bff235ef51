from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_VOLUNTEER: _ClassVar[Role]
    ROLE_BOOTSTRAP: _ClassVar[Role]

class SnapshotKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SNAPSHOT_KIND_UNSPECIFIED: _ClassVar[SnapshotKind]
    SNAPSHOT_KIND_PSEUDO_GRADIENT: _ClassVar[SnapshotKind]
    SNAPSHOT_KIND_STATE: _ClassVar[SnapshotKind]
    SNAPSHOT_KIND_SHARE: _ClassVar[SnapshotKind]
    SNAPSHOT_KIND_PUBLICATION: _ClassVar[SnapshotKind]
ROLE_UNSPECIFIED: Role
ROLE_VOLUNTEER: Role
ROLE_BOOTSTRAP: Role
SNAPSHOT_KIND_UNSPECIFIED: SnapshotKind
SNAPSHOT_KIND_PSEUDO_GRADIENT: SnapshotKind
SNAPSHOT_KIND_STATE: SnapshotKind
SNAPSHOT_KIND_SHARE: SnapshotKind
SNAPSHOT_KIND_PUBLICATION: SnapshotKind

class Signed(_message.Message):
    __slots__ = ("payload", "author", "signature")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    author: bytes
    signature: bytes
    def __init__(self, payload: _Optional[bytes] = ..., author: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Place(_message.Message):
    __slots__ = ("stages", "moving_to", "bound", "tokens_per_s", "most_stages", "move_s", "queue", "flow_tokens_per_s", "kept", "kept_rounds")
    STAGES_FIELD_NUMBER: _ClassVar[int]
    MOVING_TO_FIELD_NUMBER: _ClassVar[int]
    BOUND_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    MOST_STAGES_FIELD_NUMBER: _ClassVar[int]
    MOVE_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    FLOW_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    KEPT_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    stages: _containers.RepeatedScalarFieldContainer[int]
    moving_to: _containers.RepeatedScalarFieldContainer[int]
    bound: _containers.RepeatedScalarFieldContainer[int]
    tokens_per_s: float
    most_stages: int
    move_s: float
    queue: float
    flow_tokens_per_s: float
    kept: _containers.RepeatedScalarFieldContainer[int]
    kept_rounds: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, stages: _Optional[_Iterable[int]] = ..., moving_to: _Optional[_Iterable[int]] = ..., bound: _Optional[_Iterable[int]] = ..., tokens_per_s: _Optional[float] = ..., most_stages: _Optional[int] = ..., move_s: _Optional[float] = ..., queue: _Optional[float] = ..., flow_tokens_per_s: _Optional[float] = ..., kept: _Optional[_Iterable[int]] = ..., kept_rounds: _Optional[_Iterable[int]] = ...) -> None: ...

class Link(_message.Message):
    __slots__ = ("up_bytes_per_s", "down_bytes_per_s")
    UP_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    DOWN_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    up_bytes_per_s: float
    down_bytes_per_s: float
    def __init__(self, up_bytes_per_s: _Optional[float] = ..., down_bytes_per_s: _Optional[float] = ...) -> None: ...

class Presence(_message.Message):
    __slots__ = ("role", "name", "stamp", "round", "inner_steps_done", "steps_per_s", "addresses", "corpus_sha256", "training", "run_tokens", "part", "part_tokens", "settled", "hidden", "hosts", "place", "inner_steps", "loss", "adapter_groups", "device", "link")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STAMP_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    INNER_STEPS_DONE_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_S_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    CORPUS_SHA256_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    RUN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    PART_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    INNER_STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_GROUPS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    role: Role
    name: str
    stamp: float
    round: int
    inner_steps_done: int
    steps_per_s: float
    addresses: _containers.RepeatedScalarFieldContainer[str]
    corpus_sha256: bytes
    training: bool
    run_tokens: int
    part: int
    part_tokens: int
    settled: bool
    hidden: bool
    hosts: _containers.RepeatedScalarFieldContainer[bytes]
    place: Place
    inner_steps: int
    loss: float
    adapter_groups: int
    device: str
    link: Link
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., name: _Optional[str] = ..., stamp: _Optional[float] = ..., round: _Optional[int] = ..., inner_steps_done: _Optional[int] = ..., steps_per_s: _Optional[float] = ..., addresses: _Optional[_Iterable[str]] = ..., corpus_sha256: _Optional[bytes] = ..., training: bool = ..., run_tokens: _Optional[int] = ..., part: _Optional[int] = ..., part_tokens: _Optional[int] = ..., settled: bool = ..., hidden: bool = ..., hosts: _Optional[_Iterable[bytes]] = ..., place: _Optional[_Union[Place, _Mapping]] = ..., inner_steps: _Optional[int] = ..., loss: _Optional[float] = ..., adapter_groups: _Optional[int] = ..., device: _Optional[str] = ..., link: _Optional[_Union[Link, _Mapping]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("stage", "tokens", "round", "name")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    stage: int
    tokens: int
    round: int
    name: str
    def __init__(self, stage: _Optional[int] = ..., tokens: _Optional[int] = ..., round: _Optional[int] = ..., name: _Optional[str] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("run_sha256", "prefix", "presence", "progress")
    RUN_SHA256_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    run_sha256: bytes
    prefix: str
    presence: Presence
    progress: Progress
    def __init__(self, run_sha256: _Optional[bytes] = ..., prefix: _Optional[str] = ..., presence: _Optional[_Union[Presence, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ...) -> None: ...

class TensorInfo(_message.Message):
    __slots__ = ("name", "shape", "dtype")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ...) -> None: ...

class ShardRow(_message.Message):
    __slots__ = ("corpus_sha256", "tokens", "on")
    CORPUS_SHA256_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ON_FIELD_NUMBER: _ClassVar[int]
    corpus_sha256: bytes
    tokens: _containers.RepeatedScalarFieldContainer[int]
    on: int
    def __init__(self, corpus_sha256: _Optional[bytes] = ..., tokens: _Optional[_Iterable[int]] = ..., on: _Optional[int] = ...) -> None: ...

class PeerTokens(_message.Message):
    __slots__ = ("peer", "tokens")
    PEER_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    peer: bytes
    tokens: int
    def __init__(self, peer: _Optional[bytes] = ..., tokens: _Optional[int] = ...) -> None: ...

class Entered(_message.Message):
    __slots__ = ("peer", "round", "part", "fragment")
    PEER_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    peer: bytes
    round: int
    part: int
    fragment: int
    def __init__(self, peer: _Optional[bytes] = ..., round: _Optional[int] = ..., part: _Optional[int] = ..., fragment: _Optional[int] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("run_sha256", "author", "kind", "stage", "round", "part", "tokens", "inner_steps", "tensors", "total_bytes", "chunk_bytes", "chunk_sha256", "run_tokens", "peer_tokens", "roster_sha256", "author_tokens", "coverage", "fragment", "arrivals", "entered")
    RUN_SHA256_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    INNER_STEPS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_SHA256_FIELD_NUMBER: _ClassVar[int]
    RUN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PEER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROSTER_SHA256_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    ARRIVALS_FIELD_NUMBER: _ClassVar[int]
    ENTERED_FIELD_NUMBER: _ClassVar[int]
    run_sha256: bytes
    author: bytes
    kind: SnapshotKind
    stage: int
    round: int
    part: int
    tokens: int
    inner_steps: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorInfo]
    total_bytes: int
    chunk_bytes: int
    chunk_sha256: bytes
    run_tokens: int
    peer_tokens: _containers.RepeatedCompositeFieldContainer[PeerTokens]
    roster_sha256: bytes
    author_tokens: int
    coverage: _containers.RepeatedCompositeFieldContainer[Signed]
    fragment: int
    arrivals: int
    entered: _containers.RepeatedCompositeFieldContainer[Entered]
    def __init__(self, run_sha256: _Optional[bytes] = ..., author: _Optional[bytes] = ..., kind: _Optional[_Union[SnapshotKind, str]] = ..., stage: _Optional[int] = ..., round: _Optional[int] = ..., part: _Optional[int] = ..., tokens: _Optional[int] = ..., inner_steps: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorInfo, _Mapping]]] = ..., total_bytes: _Optional[int] = ..., chunk_bytes: _Optional[int] = ..., chunk_sha256: _Optional[bytes] = ..., run_tokens: _Optional[int] = ..., peer_tokens: _Optional[_Iterable[_Union[PeerTokens, _Mapping]]] = ..., roster_sha256: _Optional[bytes] = ..., author_tokens: _Optional[int] = ..., coverage: _Optional[_Iterable[_Union[Signed, _Mapping]]] = ..., fragment: _Optional[int] = ..., arrivals: _Optional[int] = ..., entered: _Optional[_Iterable[_Union[Entered, _Mapping]]] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("snapshot_sha256", "first_chunk", "num_chunks")
    SNAPSHOT_SHA256_FIELD_NUMBER: _ClassVar[int]
    FIRST_CHUNK_FIELD_NUMBER: _ClassVar[int]
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    snapshot_sha256: bytes
    first_chunk: int
    num_chunks: int
    def __init__(self, snapshot_sha256: _Optional[bytes] = ..., first_chunk: _Optional[int] = ..., num_chunks: _Optional[int] = ...) -> None: ...

class PullReply(_message.Message):
    __slots__ = ("status", "chunk", "data", "end", "manifest")
    class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATUS_UNSPECIFIED: _ClassVar[PullReply.Status]
        STATUS_OK: _ClassVar[PullReply.Status]
        STATUS_BUSY: _ClassVar[PullReply.Status]
        STATUS_UNKNOWN: _ClassVar[PullReply.Status]
    STATUS_UNSPECIFIED: PullReply.Status
    STATUS_OK: PullReply.Status
    STATUS_BUSY: PullReply.Status
    STATUS_UNKNOWN: PullReply.Status
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    status: PullReply.Status
    chunk: int
    data: bytes
    end: bool
    manifest: Signed
    def __init__(self, status: _Optional[_Union[PullReply.Status, str]] = ..., chunk: _Optional[int] = ..., data: _Optional[bytes] = ..., end: bool = ..., manifest: _Optional[_Union[Signed, _Mapping]] = ...) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ("run_sha256", "presence", "leaving", "wants_host", "asks_to_leave", "file_source")
    RUN_SHA256_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    WANTS_HOST_FIELD_NUMBER: _ClassVar[int]
    ASKS_TO_LEAVE_FIELD_NUMBER: _ClassVar[int]
    FILE_SOURCE_FIELD_NUMBER: _ClassVar[int]
    run_sha256: bytes
    presence: Signed
    leaving: bool
    wants_host: bool
    asks_to_leave: bool
    file_source: Signed
    def __init__(self, run_sha256: _Optional[bytes] = ..., presence: _Optional[_Union[Signed, _Mapping]] = ..., leaving: bool = ..., wants_host: bool = ..., asks_to_leave: bool = ..., file_source: _Optional[_Union[Signed, _Mapping]] = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("swarmtrain_version", "run_sha256", "time", "presence", "others", "hosting", "stay", "away", "file_sources", "protocol")
    SWARMTRAIN_VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_SHA256_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    HOSTING_FIELD_NUMBER: _ClassVar[int]
    STAY_FIELD_NUMBER: _ClassVar[int]
    AWAY_FIELD_NUMBER: _ClassVar[int]
    FILE_SOURCES_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    swarmtrain_version: str
    run_sha256: bytes
    time: float
    presence: Signed
    others: _containers.RepeatedCompositeFieldContainer[Signed]
    hosting: bool
    stay: bool
    away: bool
    file_sources: _containers.RepeatedCompositeFieldContainer[Signed]
    protocol: int
    def __init__(self, swarmtrain_version: _Optional[str] = ..., run_sha256: _Optional[bytes] = ..., time: _Optional[float] = ..., presence: _Optional[_Union[Signed, _Mapping]] = ..., others: _Optional[_Iterable[_Union[Signed, _Mapping]]] = ..., hosting: bool = ..., stay: bool = ..., away: bool = ..., file_sources: _Optional[_Iterable[_Union[Signed, _Mapping]]] = ..., protocol: _Optional[int] = ...) -> None: ...

class BlobRequest(_message.Message):
    __slots__ = ("sha256", "max_bytes")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    sha256: bytes
    max_bytes: int
    def __init__(self, sha256: _Optional[bytes] = ..., max_bytes: _Optional[int] = ...) -> None: ...

class DialTarget(_message.Message):
    __slots__ = ("caller", "ports")
    CALLER_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    caller: bytes
    ports: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, caller: _Optional[bytes] = ..., ports: _Optional[_Iterable[int]] = ...) -> None: ...

class DialRequest(_message.Message):
    __slots__ = ("target", "own_ports")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    OWN_PORTS_FIELD_NUMBER: _ClassVar[int]
    target: Signed
    own_ports: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, target: _Optional[_Union[Signed, _Mapping]] = ..., own_ports: _Optional[_Iterable[int]] = ...) -> None: ...

class DialReply(_message.Message):
    __slots__ = ("outcome", "address")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[DialReply.Outcome]
        OUTCOME_REACHED: _ClassVar[DialReply.Outcome]
        OUTCOME_NOT_REACHED: _ClassVar[DialReply.Outcome]
        OUTCOME_BUSY: _ClassVar[DialReply.Outcome]
        OUTCOME_REFUSED: _ClassVar[DialReply.Outcome]
    OUTCOME_UNSPECIFIED: DialReply.Outcome
    OUTCOME_REACHED: DialReply.Outcome
    OUTCOME_NOT_REACHED: DialReply.Outcome
    OUTCOME_BUSY: DialReply.Outcome
    OUTCOME_REFUSED: DialReply.Outcome
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    outcome: DialReply.Outcome
    address: str
    def __init__(self, outcome: _Optional[_Union[DialReply.Outcome, str]] = ..., address: _Optional[str] = ...) -> None: ...

class HistoryRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HistoryPoint(_message.Message):
    __slots__ = ("run_tokens", "time", "round", "loss", "held_out_loss")
    RUN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_LOSS_FIELD_NUMBER: _ClassVar[int]
    run_tokens: int
    time: float
    round: int
    loss: float
    held_out_loss: float
    def __init__(self, run_tokens: _Optional[int] = ..., time: _Optional[float] = ..., round: _Optional[int] = ..., loss: _Optional[float] = ..., held_out_loss: _Optional[float] = ...) -> None: ...

class TextSample(_message.Message):
    __slots__ = ("prompt", "text", "round", "run_tokens", "time")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    RUN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    text: str
    round: int
    run_tokens: int
    time: float
    def __init__(self, prompt: _Optional[str] = ..., text: _Optional[str] = ..., round: _Optional[int] = ..., run_tokens: _Optional[int] = ..., time: _Optional[float] = ...) -> None: ...

class HistoryReply(_message.Message):
    __slots__ = ("points", "sample")
    POINTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    points: _containers.RepeatedCompositeFieldContainer[HistoryPoint]
    sample: TextSample
    def __init__(self, points: _Optional[_Iterable[_Union[HistoryPoint, _Mapping]]] = ..., sample: _Optional[_Union[TextSample, _Mapping]] = ...) -> None: ...

class StateRequest(_message.Message):
    __slots__ = ("min_round",)
    MIN_ROUND_FIELD_NUMBER: _ClassVar[int]
    min_round: int
    def __init__(self, min_round: _Optional[int] = ...) -> None: ...

class StateReply(_message.Message):
    __slots__ = ("manifest", "roster")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    manifest: Signed
    roster: Signed
    def __init__(self, manifest: _Optional[_Union[Signed, _Mapping]] = ..., roster: _Optional[_Union[Signed, _Mapping]] = ...) -> None: ...

class PublicationRequest(_message.Message):
    __slots__ = ("has_any", "round", "part", "presence", "author", "weights", "fragment", "section")
    HAS_ANY_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    SECTION_FIELD_NUMBER: _ClassVar[int]
    has_any: bool
    round: int
    part: int
    presence: Signed
    author: bytes
    weights: bool
    fragment: int
    section: str
    def __init__(self, has_any: bool = ..., round: _Optional[int] = ..., part: _Optional[int] = ..., presence: _Optional[_Union[Signed, _Mapping]] = ..., author: _Optional[bytes] = ..., weights: bool = ..., fragment: _Optional[int] = ..., section: _Optional[str] = ...) -> None: ...

class PublicationReply(_message.Message):
    __slots__ = ("manifest", "presence", "away", "busy")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_FIELD_NUMBER: _ClassVar[int]
    AWAY_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    manifest: Signed
    presence: Signed
    away: bool
    busy: bool
    def __init__(self, manifest: _Optional[_Union[Signed, _Mapping]] = ..., presence: _Optional[_Union[Signed, _Mapping]] = ..., away: bool = ..., busy: bool = ...) -> None: ...

class RosterEntry(_message.Message):
    __slots__ = ("peer", "snapshot_sha256", "tokens", "inner_steps")
    PEER_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_SHA256_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    INNER_STEPS_FIELD_NUMBER: _ClassVar[int]
    peer: bytes
    snapshot_sha256: bytes
    tokens: int
    inner_steps: int
    def __init__(self, peer: _Optional[bytes] = ..., snapshot_sha256: _Optional[bytes] = ..., tokens: _Optional[int] = ..., inner_steps: _Optional[int] = ...) -> None: ...

class Roster(_message.Message):
    __slots__ = ("round", "attempt", "entries", "base", "base_tokens", "shares")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    BASE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    round: int
    attempt: int
    entries: _containers.RepeatedCompositeFieldContainer[RosterEntry]
    base: bytes
    base_tokens: int
    shares: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, round: _Optional[int] = ..., attempt: _Optional[int] = ..., entries: _Optional[_Iterable[_Union[RosterEntry, _Mapping]]] = ..., base: _Optional[bytes] = ..., base_tokens: _Optional[int] = ..., shares: _Optional[_Iterable[int]] = ...) -> None: ...

class RoundRequest(_message.Message):
    __slots__ = ("round", "has_publication", "has_roster_sha256", "has_share", "wait_s", "has_last_sha256", "wants_chain", "chain_known", "share_piece")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    HAS_PUBLICATION_FIELD_NUMBER: _ClassVar[int]
    HAS_ROSTER_SHA256_FIELD_NUMBER: _ClassVar[int]
    HAS_SHARE_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    HAS_LAST_SHA256_FIELD_NUMBER: _ClassVar[int]
    WANTS_CHAIN_FIELD_NUMBER: _ClassVar[int]
    CHAIN_KNOWN_FIELD_NUMBER: _ClassVar[int]
    SHARE_PIECE_FIELD_NUMBER: _ClassVar[int]
    round: int
    has_publication: bool
    has_roster_sha256: bytes
    has_share: bool
    wait_s: float
    has_last_sha256: bytes
    wants_chain: bool
    chain_known: _containers.RepeatedScalarFieldContainer[bytes]
    share_piece: int
    def __init__(self, round: _Optional[int] = ..., has_publication: bool = ..., has_roster_sha256: _Optional[bytes] = ..., has_share: bool = ..., wait_s: _Optional[float] = ..., has_last_sha256: _Optional[bytes] = ..., wants_chain: bool = ..., chain_known: _Optional[_Iterable[bytes]] = ..., share_piece: _Optional[int] = ...) -> None: ...

class ChainLink(_message.Message):
    __slots__ = ("roster", "manifests")
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    MANIFESTS_FIELD_NUMBER: _ClassVar[int]
    roster: Signed
    manifests: _containers.RepeatedCompositeFieldContainer[Signed]
    def __init__(self, roster: _Optional[_Union[Signed, _Mapping]] = ..., manifests: _Optional[_Iterable[_Union[Signed, _Mapping]]] = ...) -> None: ...

class RosterChain(_message.Message):
    __slots__ = ("links",)
    LINKS_FIELD_NUMBER: _ClassVar[int]
    links: _containers.RepeatedCompositeFieldContainer[ChainLink]
    def __init__(self, links: _Optional[_Iterable[_Union[ChainLink, _Mapping]]] = ...) -> None: ...

class RoundReply(_message.Message):
    __slots__ = ("current_round", "inner_steps_done", "publication", "roster", "share", "last_roster", "same_last", "participating", "away", "chain", "more_shares")
    CURRENT_ROUND_FIELD_NUMBER: _ClassVar[int]
    INNER_STEPS_DONE_FIELD_NUMBER: _ClassVar[int]
    PUBLICATION_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    LAST_ROSTER_FIELD_NUMBER: _ClassVar[int]
    SAME_LAST_FIELD_NUMBER: _ClassVar[int]
    PARTICIPATING_FIELD_NUMBER: _ClassVar[int]
    AWAY_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    MORE_SHARES_FIELD_NUMBER: _ClassVar[int]
    current_round: int
    inner_steps_done: int
    publication: Signed
    roster: Signed
    share: Signed
    last_roster: Signed
    same_last: bool
    participating: bool
    away: bool
    chain: RosterChain
    more_shares: _containers.RepeatedCompositeFieldContainer[Signed]
    def __init__(self, current_round: _Optional[int] = ..., inner_steps_done: _Optional[int] = ..., publication: _Optional[_Union[Signed, _Mapping]] = ..., roster: _Optional[_Union[Signed, _Mapping]] = ..., share: _Optional[_Union[Signed, _Mapping]] = ..., last_roster: _Optional[_Union[Signed, _Mapping]] = ..., same_last: bool = ..., participating: bool = ..., away: bool = ..., chain: _Optional[_Union[RosterChain, _Mapping]] = ..., more_shares: _Optional[_Iterable[_Union[Signed, _Mapping]]] = ...) -> None: ...
