"""The paper's program's command line and folders, on our engine; docs/from-diffumask.md says what differs, and why."""
