"""Rollouts: a process beside a trainer that lets its student write, has the teacher score it, and publishes.

`worker` is its loop, `process` the trainer's side of it:

    config      what such a process is told
    messages    what it and the trainer tell each other, line by line
    handover    how weights travel from the trainer to it
    probe       what weights compute, so that two holders of them can be compared
    engine      the student in vLLM, with weights that change in place
    prompts     what the student answers
    demand      how much is wanted, and when more would be too old
    waves       rollouts that belong together
    spool       keeps what is not in the stream yet, through a kill
    scoring     from rollouts and the teacher's scores to traces
    writing     lets the student answer prompts
    pipeline    scores and publishes on a thread of its own
"""

from lynearm.rollouts.config import RolloutConfig, Support
from lynearm.rollouts.process import RolloutProcess, RolloutStatus

__all__ = ["RolloutConfig", "RolloutProcess", "RolloutStatus", "Support"]
