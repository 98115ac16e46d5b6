"""From saved traces to labels, alarms, scores and the report. Never imports torch."""

import foreshock  # noqa: F401  (which gives this folder's modules one name)
