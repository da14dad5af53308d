"""The wire format: frame layout, the messages, and the checks between bytes and messages.

A message is one multipart zmq message::

    [identity]     only on the bound (zmq.ROUTER) side
    header         MessagePack map: "v" protocol version, "kind", then the fields of the message; of Dispatch and Reply
                   a fixed layout (`moering.expert_frames`)
    tensor bytes   of those two: raw, row-major, little-endian, one frame, unless the rows are in shared memory

From a gateway to a router each frame is a message: what goes together arrives together.

`encode` and `decode` are pure: no socket, no clock, no torch. `decode` raises `ProtocolError` with the field that is
wrong before anything else sees the content. No pickle: nothing on a wire is executed.

Who speaks what (the connecting side is written first)::

    gateway       → router         Hello, Submit, Abort           ← Welcome, Refused, Tokens, PromptLogprobs, Failed,
                                                                  RouterStats
    router        → expert server  Hello, Dispatch                ← Welcome, Refused, Reply, NotHere, Failed
    any member    → coordinator    Register, Lease, Held, Leave   ← Registered, Refused, Unknown, View
    gateway       → coordinator    Operate                        ← OperateAnswer, Events
    launcher      → coordinator    ProvenExit
"""

from __future__ import annotations

from moering.protocol.coordination import (
    Event,
    Events,
    Held,
    Lease,
    Leave,
    MemberInfo,
    Operate,
    OperateAnswer,
    Operation,
    ProvenExit,
    Register,
    Registered,
    Unknown,
    View,
)
from moering.protocol.frames import (
    KINDS,
    MAX_FRAME_BYTES,
    MAX_HEADER_BYTES,
    MAX_TENSOR_BYTES,
    PROTOCOL_VERSION,
    decode,
    encode,
)
from moering.protocol.serving import (
    MISSING_EXPERT_POLICIES,
    Abort,
    Failed,
    Hello,
    NotHere,
    PromptLogprobs,
    Refused,
    RouterStats,
    Sampling,
    Submit,
    Token,
    Tokens,
    Welcome,
)

__all__ = [
    "KINDS",
    "MAX_FRAME_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_TENSOR_BYTES",
    "MISSING_EXPERT_POLICIES",
    "PROTOCOL_VERSION",
    "Abort",
    "Event",
    "Events",
    "Failed",
    "Held",
    "Hello",
    "Lease",
    "Leave",
    "MemberInfo",
    "NotHere",
    "Operate",
    "OperateAnswer",
    "Operation",
    "PromptLogprobs",
    "ProvenExit",
    "Refused",
    "Register",
    "Registered",
    "RouterStats",
    "Sampling",
    "Submit",
    "Token",
    "Tokens",
    "Unknown",
    "View",
    "Welcome",
    "decode",
    "encode",
]
