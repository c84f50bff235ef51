from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StageKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAGE_KIND_UNSPECIFIED: _ClassVar[StageKind]
    STAGE_KIND_FORWARD: _ClassVar[StageKind]
    STAGE_KIND_BACKWARD: _ClassVar[StageKind]
    STAGE_KIND_TAIL: _ClassVar[StageKind]
    STAGE_KIND_SETTLE: _ClassVar[StageKind]
    STAGE_KIND_STAY: _ClassVar[StageKind]
STAGE_KIND_UNSPECIFIED: StageKind
STAGE_KIND_FORWARD: StageKind
STAGE_KIND_BACKWARD: StageKind
STAGE_KIND_TAIL: StageKind
STAGE_KIND_SETTLE: StageKind
STAGE_KIND_STAY: StageKind

class MicrobatchKey(_message.Message):
    __slots__ = ("sequence", "attempt", "loss")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    attempt: int
    loss: float
    def __init__(self, sequence: _Optional[int] = ..., attempt: _Optional[int] = ..., loss: _Optional[float] = ...) -> None: ...

class StageTensor(_message.Message):
    __slots__ = ("format", "shape", "size_bytes")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    format: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    size_bytes: int
    def __init__(self, format: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class StageQuestion(_message.Message):
    __slots__ = ("stage", "kind", "key", "tokens", "tensors", "sha256", "settlement")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SETTLEMENT_FIELD_NUMBER: _ClassVar[int]
    stage: int
    kind: StageKind
    key: MicrobatchKey
    tokens: int
    tensors: _containers.RepeatedCompositeFieldContainer[StageTensor]
    sha256: bytes
    settlement: Settlement
    def __init__(self, stage: _Optional[int] = ..., kind: _Optional[_Union[StageKind, str]] = ..., key: _Optional[_Union[MicrobatchKey, _Mapping]] = ..., tokens: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[StageTensor, _Mapping]]] = ..., sha256: _Optional[bytes] = ..., settlement: _Optional[_Union[Settlement, _Mapping]] = ...) -> None: ...

class Settlement(_message.Message):
    __slots__ = ("acknowledged", "dropped", "oldest_open", "life")
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    OLDEST_OPEN_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    acknowledged: _containers.RepeatedCompositeFieldContainer[MicrobatchKey]
    dropped: _containers.RepeatedCompositeFieldContainer[MicrobatchKey]
    oldest_open: int
    life: int
    def __init__(self, acknowledged: _Optional[_Iterable[_Union[MicrobatchKey, _Mapping]]] = ..., dropped: _Optional[_Iterable[_Union[MicrobatchKey, _Mapping]]] = ..., oldest_open: _Optional[int] = ..., life: _Optional[int] = ...) -> None: ...

class StageAnswer(_message.Message):
    __slots__ = ("status", "reason", "tensors", "sha256", "loss", "late", "life", "stays_s")
    class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATUS_UNSPECIFIED: _ClassVar[StageAnswer.Status]
        STATUS_OK: _ClassVar[StageAnswer.Status]
        STATUS_BUSY: _ClassVar[StageAnswer.Status]
        STATUS_GONE: _ClassVar[StageAnswer.Status]
        STATUS_REFUSED: _ClassVar[StageAnswer.Status]
    STATUS_UNSPECIFIED: StageAnswer.Status
    STATUS_OK: StageAnswer.Status
    STATUS_BUSY: StageAnswer.Status
    STATUS_GONE: StageAnswer.Status
    STATUS_REFUSED: StageAnswer.Status
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    STAYS_S_FIELD_NUMBER: _ClassVar[int]
    status: StageAnswer.Status
    reason: str
    tensors: _containers.RepeatedCompositeFieldContainer[StageTensor]
    sha256: bytes
    loss: float
    late: _containers.RepeatedCompositeFieldContainer[MicrobatchKey]
    life: int
    stays_s: float
    def __init__(self, status: _Optional[_Union[StageAnswer.Status, str]] = ..., reason: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[StageTensor, _Mapping]]] = ..., sha256: _Optional[bytes] = ..., loss: _Optional[float] = ..., late: _Optional[_Iterable[_Union[MicrobatchKey, _Mapping]]] = ..., life: _Optional[int] = ..., stays_s: _Optional[float] = ...) -> None: ...
