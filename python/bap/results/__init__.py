"""Whole runs and what comes of them: results, scores, reports, studies."""
