"""The demo: a real teacher teaches a real student on one machine, from prompts to Apple packages."""
