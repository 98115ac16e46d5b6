"""From saved traces to labels, alarms, scores and the report. Never imports torch."""
