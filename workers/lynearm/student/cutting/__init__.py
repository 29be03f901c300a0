"""Students cut out of their teachers: fewer layers, heads, neurons or channels, of the same weights.

Public names, each to be imported from its own module, so that reading a configuration loads no torch:

- `config.CutConfig`: how much is kept, and how it is chosen.
- `cut.cut_student`, `cut.Evidence`: makes a student, by a teacher profile or by its own measurements.
- `profile_files.read_profile_file`: a teacher profile that was saved.
- `progress.CutProgress`, `progress.CutReport`: what a cut says.
- `sequences.CalibrationSequence`, `sequences.sequences_from_traces`: the text to measure on.
"""
