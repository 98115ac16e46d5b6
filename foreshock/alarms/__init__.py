"""Live alarms: rules that judge each reading of a running training, and what an alarm does (``docs/alarms.md``)."""
