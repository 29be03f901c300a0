"""The student: trains any transformers causal LM on a stream of a teacher's distributions, as it is written.

Public names, each to be imported from its own module, so that reading a configuration loads no torch:

- `config.TrainConfig`: everything a trainer can be told.
- `trainer.run_train`: follows a stream, trains, measures, saves.
- `progress.TrainProgress`, `progress.TrainReport`: what a run says while it works, and at its end.
- `objective.Objective`, `losses.distillation_loss`: what is brought down, and its gradient in little memory.
- `weighting.PositionWeighting`: how much each position counts.
- `evaluation.evaluate`, `evaluation.write_parity_tokens`: held-out KL; held-out tokens for exporters.
- `checkpoint.latest_checkpoint`, `checkpoint.load_checkpoint`: weights, optimizer and cursor as one.
- `cutting.cut.cut_student`: a student made of some of a teacher's layers, heads, neurons and channels.
"""
