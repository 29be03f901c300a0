"""Exporters: a checkpoint becomes an MLX or Core ML package, checked against the checkpoint after writing.

Public names, imported from their modules so that reading a configuration loads neither torch nor MLX nor
coremltools: `config.MlxExportConfig`, `config.CoreMlExportConfig`; `mlx_export.export_mlx`;
`coreml_export.export_coreml`; `speech.generate_texts_mlx`.
"""
