"""Jobs, leases and the work that they cover, as generated code sends them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from traces.harness import Producer, make_block

from lynearm.v1 import prompt_queue_pb2 as pb
from lynearm.v1.trace_service_pb2_grpc import TraceServiceStub
from lynearm.wire.work import DIGEST_OF_NOTHING, extend_digest

Unit = tuple[str, int]
"""(prompt id, sample index)."""


def make_prompts(count: int) -> list[pb.JobPrompt]:
    return [pb.JobPrompt(prompt_id=f"p{number}", content=b"line %d" % number) for number in range(count)]


def digest_of(prompts: Iterable[pb.JobPrompt]) -> bytes:
    digest = DIGEST_OF_NOTHING
    for prompt in prompts:
        digest = extend_digest(digest, prompt.prompt_id, prompt.content)
    return digest


def announce(
    stub: TraceServiceStub, prompts: Sequence[pb.JobPrompt], *, samples: int = 1, **more: Any
) -> pb.Job:
    request: dict[str, Any] = {
        "stream": "s",
        "name": "j",
        "samples_per_prompt": samples,
        "prompt_count": len(prompts),
        "content_sha256": digest_of(prompts),
        **more,
    }
    return stub.CreateJob(pb.CreateJobRequest(**request)).job


def add(stub: TraceServiceStub, prompts: Sequence[pb.JobPrompt], first: int = 0, **more: Any) -> int:
    """Add prompts; how many the service has then. `digest` is of all prompts, if these are not all."""
    digest = more.pop("digest", None) or digest_of(prompts)
    request = {"stream": "s", "job": "j", "first_prompt": first, "content_sha256": digest, **more}
    return stub.AddPrompts(pb.AddPromptsRequest(prompts=prompts, **request)).stored_prompt_count


def create_job(
    stub: TraceServiceStub, prompts: Sequence[pb.JobPrompt] | int, *, samples: int = 1, **more: Any
) -> None:
    prompts = make_prompts(prompts) if isinstance(prompts, int) else prompts
    announce(stub, prompts, samples=samples, **more)
    stored = add(stub, prompts, **({"job": more["name"]} if "name" in more else {}))
    assert stored == len(prompts)


def get_job(stub: TraceServiceStub, name: str = "j") -> pb.Job:
    return stub.GetJob(pb.GetJobRequest(stream="s", name=name)).job


def lease(stub: TraceServiceStub, units: int, worker: str = "w", **more: Any) -> pb.LeasePromptsResponse:
    request: dict[str, Any] = {"stream": "s", "job": "j", "worker": worker, "max_units": units, **more}
    return stub.LeasePrompts(pb.LeasePromptsRequest(**request))


def units_of(leased: pb.Lease) -> list[Unit]:
    return [(prompt.prompt_id, index) for prompt in leased.prompts for index in prompt.sample_indices]


def finish(key: pb.LeaseKey, units: Iterable[Unit]) -> pb.FinishedWork:
    work = pb.FinishedWork(lease=key)
    for prompt_id in dict.fromkeys(prompt_id for prompt_id, _ in units):
        indices = sorted(index for found, index in units if found == prompt_id)
        work.prompts.add(prompt_id=prompt_id, sample_indices=indices)
    return work


def publish_work(
    stub: TraceServiceStub, *work: pb.FinishedWork, producer_id: str = "p", number: int = 0
) -> dict[int, int]:
    """Publish one block that finishes work; the acknowledgement, or the call's error is raised."""
    producer = Producer(stub, producer_id=producer_id)
    producer.send(1, make_block(number), finished_work=work)
    return producer.close()


def finished(stub: TraceServiceStub) -> list[str]:
    from lynearm.v1 import trace_service_pb2

    request = trace_service_pb2.ListFinishedPromptsRequest(stream="s")
    return [prompt_id for page in stub.ListFinishedPrompts(request) for prompt_id in page.prompt_ids]


def locate(stub: TraceServiceStub, *prompt_ids: str) -> list[tuple[str, int, list[int]]]:
    found = stub.LocatePrompts(pb.LocatePromptsRequest(stream="s", prompt_ids=prompt_ids)).locations
    return [(one.prompt_id, one.offset, list(one.sample_indices)) for one in found]
