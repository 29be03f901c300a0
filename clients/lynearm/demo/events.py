"""One line for people from each event of a role."""

from __future__ import annotations

from lynearm.demo.processes import Event


def describe_teach(event: Event) -> str:
    """Where the teacher is, or what it did."""
    if event["event"] == "teach_report":
        seconds = max(event["stage_seconds"].get("generating", 0.0), 1e-9)
        return (
            f"{event['completion_tokens']:,} tokens of {event['completed']} prompts, "
            f"{event['completion_tokens'] / seconds:.0f} tok/s"
        )
    parts = [event["message"] or event["stage"]]
    if event["generated_tokens"]:
        parts += [
            f"{event['done_prompts']}/{event['prompts']} prompts",
            f"{event['generated_tokens']:,} tokens",
            f"{event['tokens_per_second']:.0f} tok/s",
        ]
    return " · ".join(parts)


def describe_train(event: Event) -> str:
    """Where the student is, or what it came to."""
    if event["event"] == "train_report":
        evaluations = event["evaluations"]
        text = f"{event['steps']} steps, {event['tokens']:,} tokens"
        if evaluations:
            text += f", held-out KL {evaluations[0]['kl']:.3f} → {evaluations[-1]['kl']:.3f}"
        return text
    parts = [event["message"] or event["stage"]]
    record, held_out = event["record"], event["held_out"]
    if record:
        parts += [
            f"step {record['step']}",
            f"loss {record['loss']:.2f}",
            f"{event['tokens_per_second']:.0f} tok/s",
        ]
    if held_out:
        parts.append(f"held-out KL {held_out['kl']:.3f}")
    return " · ".join(parts)


def describe_export(event: Event) -> str:
    """Where an export is, or what it came to."""
    if event["event"].endswith("_progress"):
        return str(event["stage"])
    parity = event["parity"]
    return f"{event['size_bytes'] / 1e6:.0f} MB, KL to the student {parity['kl_mean']:.1e}"
