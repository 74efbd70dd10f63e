"""Tells other programs what a live decoder decides, and takes their commands: JSON lines, WebSocket, Dareplane."""
