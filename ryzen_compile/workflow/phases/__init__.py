"""The phases of a workflow, one file each: what they read, what they do, what they leave behind."""
