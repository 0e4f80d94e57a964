"""Whole models as files for other runtimes: exported, run against their source, and kept if they agree."""
