"""The project's tests, a package so that others of that name in an environment do not hide it."""
