"""What alarms are worth: outcomes, leads, delays, and how sure they are over seeds and faults."""
