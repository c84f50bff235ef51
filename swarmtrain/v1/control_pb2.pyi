from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PeerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PEER_STATE_UNSPECIFIED: _ClassVar[PeerState]
    PEER_STATE_STARTING: _ClassVar[PeerState]
    PEER_STATE_WAITING: _ClassVar[PeerState]
    PEER_STATE_TRAINING: _ClassVar[PeerState]
    PEER_STATE_PAUSED: _ClassVar[PeerState]
    PEER_STATE_SERVING: _ClassVar[PeerState]
    PEER_STATE_FINISHING: _ClassVar[PeerState]
    PEER_STATE_DONE: _ClassVar[PeerState]
    PEER_STATE_FAILED: _ClassVar[PeerState]
PEER_STATE_UNSPECIFIED: PeerState
PEER_STATE_STARTING: PeerState
PEER_STATE_WAITING: PeerState
PEER_STATE_TRAINING: PeerState
PEER_STATE_PAUSED: PeerState
PEER_STATE_SERVING: PeerState
PEER_STATE_FINISHING: PeerState
PEER_STATE_DONE: PeerState
PEER_STATE_FAILED: PeerState

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PauseRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckpointRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RunHistoryRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RunHistory(_message.Message):
    __slots__ = ("run_sha256", "total_tokens", "points", "events", "sample")
    RUN_SHA256_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    run_sha256: str
    total_tokens: int
    points: _containers.RepeatedCompositeFieldContainer[LossPoint]
    events: _containers.RepeatedCompositeFieldContainer[NotedEvent]
    sample: ModelSample
    def __init__(self, run_sha256: _Optional[str] = ..., total_tokens: _Optional[int] = ..., points: _Optional[_Iterable[_Union[LossPoint, _Mapping]]] = ..., events: _Optional[_Iterable[_Union[NotedEvent, _Mapping]]] = ..., sample: _Optional[_Union[ModelSample, _Mapping]] = ...) -> None: ...

class NotedEvent(_message.Message):
    __slots__ = ("time", "event", "words", "count", "last_time", "about")
    TIME_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    LAST_TIME_FIELD_NUMBER: _ClassVar[int]
    ABOUT_FIELD_NUMBER: _ClassVar[int]
    time: float
    event: str
    words: str
    count: int
    last_time: float
    about: str
    def __init__(self, time: _Optional[float] = ..., event: _Optional[str] = ..., words: _Optional[str] = ..., count: _Optional[int] = ..., last_time: _Optional[float] = ..., about: _Optional[str] = ...) -> None: ...

class ModelSample(_message.Message):
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

class ControlReply(_message.Message):
    __slots__ = ("message",)
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    message: str
    def __init__(self, message: _Optional[str] = ...) -> None: ...

class CheckpointReply(_message.Message):
    __slots__ = ("round", "path")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    round: int
    path: str
    def __init__(self, round: _Optional[int] = ..., path: _Optional[str] = ...) -> None: ...

class PeerStatus(_message.Message):
    __slots__ = ("peer", "name", "role", "version", "pid", "started_time", "time", "state", "doing", "run_name", "run_sha256", "invite_line", "round", "inner_steps_done", "inner_steps", "run_tokens", "total_tokens", "own_tokens", "own_tokens_per_s", "swarm_tokens_per_s", "losses", "peers", "sent_bytes", "received_bytes", "sent_bytes_per_s", "received_bytes_per_s", "times_below_allreduce", "stall_share", "checkpoint", "notices", "limits", "end_reason", "exit_code", "held_out_loss", "data", "last_merge", "dht_records", "stages", "end_time", "swarm_loss", "archive", "reach", "device", "adapter", "shows_invite", "vocabulary_size", "held_out_time", "source_losses")
    PEER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STARTED_TIME_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DOING_FIELD_NUMBER: _ClassVar[int]
    RUN_NAME_FIELD_NUMBER: _ClassVar[int]
    RUN_SHA256_FIELD_NUMBER: _ClassVar[int]
    INVITE_LINE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    INNER_STEPS_DONE_FIELD_NUMBER: _ClassVar[int]
    INNER_STEPS_FIELD_NUMBER: _ClassVar[int]
    RUN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OWN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OWN_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    SWARM_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    TIMES_BELOW_ALLREDUCE_FIELD_NUMBER: _ClassVar[int]
    STALL_SHARE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    NOTICES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    END_REASON_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_LOSS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LAST_MERGE_FIELD_NUMBER: _ClassVar[int]
    DHT_RECORDS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    END_TIME_FIELD_NUMBER: _ClassVar[int]
    SWARM_LOSS_FIELD_NUMBER: _ClassVar[int]
    ARCHIVE_FIELD_NUMBER: _ClassVar[int]
    REACH_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    SHOWS_INVITE_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_SIZE_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_TIME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_LOSSES_FIELD_NUMBER: _ClassVar[int]
    peer: str
    name: str
    role: str
    version: str
    pid: int
    started_time: float
    time: float
    state: PeerState
    doing: str
    run_name: str
    run_sha256: str
    invite_line: str
    round: int
    inner_steps_done: int
    inner_steps: int
    run_tokens: int
    total_tokens: int
    own_tokens: int
    own_tokens_per_s: float
    swarm_tokens_per_s: float
    losses: _containers.RepeatedCompositeFieldContainer[LossPoint]
    peers: _containers.RepeatedCompositeFieldContainer[SwarmPeer]
    sent_bytes: int
    received_bytes: int
    sent_bytes_per_s: float
    received_bytes_per_s: float
    times_below_allreduce: float
    stall_share: float
    checkpoint: KeptCheckpoint
    notices: _containers.RepeatedCompositeFieldContainer[Notice]
    limits: Limits
    end_reason: str
    exit_code: int
    held_out_loss: float
    data: str
    last_merge: str
    dht_records: int
    stages: _containers.RepeatedCompositeFieldContainer[StageStatus]
    end_time: float
    swarm_loss: float
    archive: Archive
    reach: str
    device: DeviceStatus
    adapter: str
    shows_invite: bool
    vocabulary_size: int
    held_out_time: float
    source_losses: _containers.RepeatedCompositeFieldContainer[SourceLoss]
    def __init__(self, peer: _Optional[str] = ..., name: _Optional[str] = ..., role: _Optional[str] = ..., version: _Optional[str] = ..., pid: _Optional[int] = ..., started_time: _Optional[float] = ..., time: _Optional[float] = ..., state: _Optional[_Union[PeerState, str]] = ..., doing: _Optional[str] = ..., run_name: _Optional[str] = ..., run_sha256: _Optional[str] = ..., invite_line: _Optional[str] = ..., round: _Optional[int] = ..., inner_steps_done: _Optional[int] = ..., inner_steps: _Optional[int] = ..., run_tokens: _Optional[int] = ..., total_tokens: _Optional[int] = ..., own_tokens: _Optional[int] = ..., own_tokens_per_s: _Optional[float] = ..., swarm_tokens_per_s: _Optional[float] = ..., losses: _Optional[_Iterable[_Union[LossPoint, _Mapping]]] = ..., peers: _Optional[_Iterable[_Union[SwarmPeer, _Mapping]]] = ..., sent_bytes: _Optional[int] = ..., received_bytes: _Optional[int] = ..., sent_bytes_per_s: _Optional[float] = ..., received_bytes_per_s: _Optional[float] = ..., times_below_allreduce: _Optional[float] = ..., stall_share: _Optional[float] = ..., checkpoint: _Optional[_Union[KeptCheckpoint, _Mapping]] = ..., notices: _Optional[_Iterable[_Union[Notice, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., end_reason: _Optional[str] = ..., exit_code: _Optional[int] = ..., held_out_loss: _Optional[float] = ..., data: _Optional[str] = ..., last_merge: _Optional[str] = ..., dht_records: _Optional[int] = ..., stages: _Optional[_Iterable[_Union[StageStatus, _Mapping]]] = ..., end_time: _Optional[float] = ..., swarm_loss: _Optional[float] = ..., archive: _Optional[_Union[Archive, _Mapping]] = ..., reach: _Optional[str] = ..., device: _Optional[_Union[DeviceStatus, _Mapping]] = ..., adapter: _Optional[str] = ..., shows_invite: bool = ..., vocabulary_size: _Optional[int] = ..., held_out_time: _Optional[float] = ..., source_losses: _Optional[_Iterable[_Union[SourceLoss, _Mapping]]] = ...) -> None: ...

class SourceLoss(_message.Message):
    __slots__ = ("name", "held_out_loss")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_LOSS_FIELD_NUMBER: _ClassVar[int]
    name: str
    held_out_loss: float
    def __init__(self, name: _Optional[str] = ..., held_out_loss: _Optional[float] = ...) -> None: ...

class DeviceStatus(_message.Message):
    __slots__ = ("device", "title", "precision", "compiled", "microbatch_sequences", "why")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    COMPILED_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    device: str
    title: str
    precision: str
    compiled: bool
    microbatch_sequences: int
    why: str
    def __init__(self, device: _Optional[str] = ..., title: _Optional[str] = ..., precision: _Optional[str] = ..., compiled: bool = ..., microbatch_sequences: _Optional[int] = ..., why: _Optional[str] = ...) -> None: ...

class StageStatus(_message.Message):
    __slots__ = ("number", "num_peers", "tokens_per_s", "most_tokens_per_s", "mine", "queue")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NUM_PEERS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    MOST_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    MINE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    number: int
    num_peers: int
    tokens_per_s: float
    most_tokens_per_s: float
    mine: bool
    queue: float
    def __init__(self, number: _Optional[int] = ..., num_peers: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., most_tokens_per_s: _Optional[float] = ..., mine: bool = ..., queue: _Optional[float] = ...) -> None: ...

class LossPoint(_message.Message):
    __slots__ = ("round", "run_tokens", "loss", "held_out_loss", "time")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    RUN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_LOSS_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    round: int
    run_tokens: int
    loss: float
    held_out_loss: float
    time: float
    def __init__(self, round: _Optional[int] = ..., run_tokens: _Optional[int] = ..., loss: _Optional[float] = ..., held_out_loss: _Optional[float] = ..., time: _Optional[float] = ...) -> None: ...

class SwarmPeer(_message.Message):
    __slots__ = ("peer", "name", "tokens", "present", "bootstrap", "round", "tokens_per_s", "stages", "acknowledged_tokens", "heard_time", "hidden", "loss", "device", "last_tokens_per_s")
    PEER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    BOOTSTRAP_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HEARD_TIME_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    LAST_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    peer: str
    name: str
    tokens: int
    present: bool
    bootstrap: bool
    round: int
    tokens_per_s: float
    stages: _containers.RepeatedScalarFieldContainer[int]
    acknowledged_tokens: int
    heard_time: float
    hidden: bool
    loss: float
    device: str
    last_tokens_per_s: float
    def __init__(self, peer: _Optional[str] = ..., name: _Optional[str] = ..., tokens: _Optional[int] = ..., present: bool = ..., bootstrap: bool = ..., round: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., stages: _Optional[_Iterable[int]] = ..., acknowledged_tokens: _Optional[int] = ..., heard_time: _Optional[float] = ..., hidden: bool = ..., loss: _Optional[float] = ..., device: _Optional[str] = ..., last_tokens_per_s: _Optional[float] = ...) -> None: ...

class KeptCheckpoint(_message.Message):
    __slots__ = ("round", "time", "size_bytes")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    round: int
    time: float
    size_bytes: int
    def __init__(self, round: _Optional[int] = ..., time: _Optional[float] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class Archive(_message.Message):
    __slots__ = ("num_rounds", "run_tokens", "time", "path")
    NUM_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    RUN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    num_rounds: int
    run_tokens: int
    time: float
    path: str
    def __init__(self, num_rounds: _Optional[int] = ..., run_tokens: _Optional[int] = ..., time: _Optional[float] = ..., path: _Optional[str] = ...) -> None: ...

class Notice(_message.Message):
    __slots__ = ("time", "message")
    TIME_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    time: float
    message: str
    def __init__(self, time: _Optional[float] = ..., message: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("threads", "memory_bytes", "nice", "only_when_idle", "hours", "up_mbit", "down_mbit", "slowdown", "gpu_share", "gpu_any_time", "on_battery", "max_temperature")
    THREADS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    NICE_FIELD_NUMBER: _ClassVar[int]
    ONLY_WHEN_IDLE_FIELD_NUMBER: _ClassVar[int]
    HOURS_FIELD_NUMBER: _ClassVar[int]
    UP_MBIT_FIELD_NUMBER: _ClassVar[int]
    DOWN_MBIT_FIELD_NUMBER: _ClassVar[int]
    SLOWDOWN_FIELD_NUMBER: _ClassVar[int]
    GPU_SHARE_FIELD_NUMBER: _ClassVar[int]
    GPU_ANY_TIME_FIELD_NUMBER: _ClassVar[int]
    ON_BATTERY_FIELD_NUMBER: _ClassVar[int]
    MAX_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    threads: int
    memory_bytes: int
    nice: int
    only_when_idle: bool
    hours: str
    up_mbit: float
    down_mbit: float
    slowdown: float
    gpu_share: int
    gpu_any_time: bool
    on_battery: bool
    max_temperature: float
    def __init__(self, threads: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., nice: _Optional[int] = ..., only_when_idle: bool = ..., hours: _Optional[str] = ..., up_mbit: _Optional[float] = ..., down_mbit: _Optional[float] = ..., slowdown: _Optional[float] = ..., gpu_share: _Optional[int] = ..., gpu_any_time: bool = ..., on_battery: bool = ..., max_temperature: _Optional[float] = ...) -> None: ...
