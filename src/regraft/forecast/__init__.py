"""The forecast: will this adapter survive on the new base, and how much of it?"""

from regraft.forecast.evidence import Evidence, Survey
from regraft.forecast.verdict import FLOOR, Judgement, judge

__all__ = ["FLOOR", "Evidence", "Judgement", "Survey", "judge"]
