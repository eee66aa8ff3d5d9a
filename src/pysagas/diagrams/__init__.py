"""Draws a saga, or what became of a run: Mermaid pictures, and a timeline for a terminal.

Mermaid is a text that GitHub, GitLab, many editors and documentation tools show as a picture.
`mermaid` gives a flowchart, of a saga or of an outcome; `timeline` says who ran when, as a table with
bars or as a Gantt chart.
"""

from ._flowchart import mermaid
from ._timeline import Timeline, timeline

__all__ = ["Timeline", "mermaid", "timeline"]
