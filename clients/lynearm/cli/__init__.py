"""The `lynearm` command: one verb for each role, over the roles' own entry points.

Nothing here is imported before it is needed: `lynearm --help` loads typer alone.
"""
