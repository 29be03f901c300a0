"""Pages about runs: one HTML file each, with curves, without scripts and with nothing to fetch.

Public names, each to be imported from its own module:

- `charts.draw_chart`: line charts as SVG.
- `page.render_page`, `page.write_page`: the frame of a page, and its parts.
- `training.render_training_report`: a training run, from its metrics and its manifest.
"""
