"""The leaderboard as a static site, made from an index: see docs/report.md."""
