"""When a detector alarms: tracks, charts, thresholds on healthy runs, and detectors from elsewhere."""
