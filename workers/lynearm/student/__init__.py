"""The student: trains any causal LM of transformers on a stream of a teacher's top-k distributions, as it is written.

Public names, each to be imported from its own module, so that reading a configuration loads no torch:

- `config.TrainConfig`: everything a trainer can be told.
- `trainer.run_train`, `trainer.Trainer`: the loop, and one step of it.
- `progress.TrainProgress`, `progress.TrainReport`: what the loop says while it runs, and at the end.
- `sources.TraceSource`, `sources.ServiceSource`: where traces come from.
- `losses.distillation_loss`: forward KL over top-k and tail, mixed with cross-entropy.
- `evaluation.evaluate`: held-out KL per token.
- `checkpoint.save_checkpoint`, `checkpoint.load_checkpoint`: weights, optimizer and cursor as one.
- `cutting.cut_student`: a student made of a teacher's layers.
"""
