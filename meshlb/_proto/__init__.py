"""Generated code of the demo's gRPC service (proto/meshlb/demo/v1/echo.proto); `make proto` writes it again."""
