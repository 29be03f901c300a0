"""What moves teacher logprobs elsewhere, and ours, each carrying the same 64 ids and logprobs a token.

Each has a sender, which begins with arrays, and a receiver, which ends with them. `Material` makes the traces
in each process anew, before anything is measured.

- JSON over HTTP: a server of the standard library answers with completions as vLLM's completions API writes
  them, `top_logprobs` a dict for each position, floats in full; the receiver parses them into arrays.
- Pickles over ZeroMQ: two NumPy arrays for each completion, pickled in protocol 5, which is cheaper than
  pickling torch tensors; PUSH to PULL over loopback.
- A Ray queue: the same arrays through `ray.util.queue`; the CPU time of its actor and of the raylet, which
  keeps the objects, counts.
- Ours: encoded, published (and synced to disk, which no other does), followed live, decoded; in the standard
  mode, which rounds logprobs, and in the exact one.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import transport_roles as roles
import zmq
from codec_corpus import build_traces, count_tokens, cut_trace, group_traces, load_corpus, make_corpus
from transport_roles import Source

from lynearm.wire.codec import decode_block, encode_block
from lynearm.wire.specs import CodecMode
from lynearm.wire.traces import Trace

TOP_K = 64

Arrays = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Material:
    """The completions that every way carries, `passes` times."""

    corpus: Path | None
    """An .npz of rows; None: made up."""
    positions: int
    passes: int

    @property
    def tokens(self) -> int:
        return count_tokens(_traces(self)) * self.passes

    @property
    def count(self) -> int:
        """Completions."""
        return len(_traces(self)) * self.passes

    def traces(self) -> Iterator[Trace]:
        for _ in range(self.passes):
            yield from _traces(self)

    def arrays(self) -> Iterator[Arrays]:
        return ((trace.top_k.token_ids, trace.top_k.logprobs) for trace in self.traces())


def describe(material: Material) -> tuple[int, int]:
    """How many completions and tokens there are; makes them."""
    return material.count, material.tokens


def publish_traces(source: Source, material: Material, mode: CodecMode, block_tokens: int) -> int:
    """Encode and publish, until all is durable; returns the bytes of the blocks."""
    size_bytes = 0
    with source.client.publisher(source.stream, "benchmark") as publisher:
        for _ in range(material.passes):
            for group in group_traces(_traces(material), block_tokens):
                block = encode_block(group, codec=mode, vocab_size=roles.VOCAB_SIZE)
                size_bytes += len(block)
                publisher.publish(block)
    return size_bytes


def follow_traces(source: Source, completions: int) -> int:
    """Follow and decode; returns how many tokens came."""
    tokens = 0
    with source.client.subscribe(source.stream) as subscription:
        for received in subscription:
            traces = decode_block(received.block)
            tokens += count_tokens(traces)
            completions -= len(traces)
            if completions <= 0:
                break
    return tokens


def warm_up_codec(material: Material, mode: CodecMode, block_tokens: int) -> None:
    """Compile what encoding and decoding need."""
    group = group_traces(_traces(material), block_tokens)[0]
    decode_block(encode_block(group, codec=mode, vocab_size=roles.VOCAB_SIZE))


def start_http() -> int:
    """Open the port at which `serve_http` answers."""
    server = _open_ports["http"] = HTTPServer(("127.0.0.1", 0), _CompletionsHandler)
    return server.server_address[1]


def serve_http(material: Material) -> int:
    """Answer one connection until the last completion; returns the bytes of the bodies."""
    _CompletionsHandler.arrays, _CompletionsHandler.sent_bytes = material.arrays(), 0
    server: HTTPServer = _open_ports.pop("http")
    server.handle_request()  # a connection's requests, until it ends
    server.server_close()
    return _CompletionsHandler.sent_bytes


def receive_http(port: int, material: Material) -> int:
    """Ask for every completion over one connection; returns how many tokens came."""
    connection = HTTPConnection("127.0.0.1", port)
    tokens = 0
    for _ in range(material.count):
        connection.request("POST", "/v1/completions", body=b"{}")
        token_ids, _ = _from_vllm_json(connection.getresponse().read())
        tokens += len(token_ids)
    connection.close()
    return tokens


def bind_zeromq() -> int:
    """Open the port from which `receive_zeromq` reads."""
    pull = _open_ports["zeromq"] = zmq.Context.instance().socket(zmq.PULL)
    return pull.bind_to_random_port("tcp://127.0.0.1")


def send_zeromq(port: int, material: Material) -> int:
    """Push every completion; returns the bytes of the pickles."""
    size_bytes = 0
    with zmq.Context.instance().socket(zmq.PUSH) as push:
        push.connect(f"tcp://127.0.0.1:{port}")
        for arrays in material.arrays():
            message = pickle.dumps(arrays, protocol=5)
            size_bytes += len(message)
            push.send(message, copy=False)
    return size_bytes


def receive_zeromq(material: Material) -> int:
    """Take every completion; returns how many tokens came."""
    pull = _open_ports["zeromq"]
    tokens = 0
    for _ in range(material.count):
        token_ids, _ = pickle.loads(pull.recv(copy=False).buffer)
        tokens += len(token_ids)
    return tokens


class _CompletionsHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    arrays: Iterator[Arrays]
    sent_bytes: int

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = _to_vllm_json(next(self.arrays))
        type(self).sent_bytes += len(body)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _to_vllm_json(arrays: Arrays) -> bytes:
    names = [[f"token_id:{token_id}" for token_id in row] for row in arrays[0].tolist()]
    rows = [dict(zip(*row, strict=True)) for row in zip(names, arrays[1].tolist(), strict=True)]
    logprobs = {
        "text_offset": [0] * len(rows),
        "token_logprobs": [next(iter(row.values())) for row in rows],
        "tokens": [row[0] for row in names],
        "top_logprobs": rows,
    }
    return json.dumps({"choices": [{"index": 0, "text": "", "logprobs": logprobs}]}).encode()


def _from_vllm_json(body: bytes) -> Arrays:
    rows: Sequence[dict[str, float]] = json.loads(body)["choices"][0]["logprobs"]["top_logprobs"]
    token_ids = [[int(name[9:]) for name in row] for row in rows]
    return np.array(token_ids, np.int32), np.array([list(row.values()) for row in rows], np.float32)


_open_ports: dict[str, Any] = {}
"""Servers and sockets between the call that opens them and the one that uses them."""


@cache
def _traces(material: Material) -> list[Trace]:
    if material.corpus is None:
        corpus = make_corpus(material.positions)
    else:
        corpus = load_corpus(material.corpus)
        corpus = corpus.select(np.arange(min(material.positions, corpus.positions)))
    return [piece for trace in build_traces(corpus, TOP_K) for piece in cut_trace(trace, 1024)]
