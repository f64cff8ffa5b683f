"""The only machinery: passes, plans, schedules and the loop. Nothing here knows a method."""
