"""Runs from training to results.json, scores, reports and studies."""
