"""The page and chatstream.js: `files` says what is served, `meter` shows the demo's provider."""
