package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"

	. "github.com/gpustack/gguf-parser-go"
)

// usage: gguf-estimate FILE CTX UBATCH KVTYPE: MiB on one GPU with everything offloaded, flash attention on
func main() {
	f, err := ParseGGUFFile(os.Args[1])
	if err != nil { fmt.Println(err); os.Exit(1) }
	ctx, _ := strconv.Atoi(os.Args[2])
	ub, _ := strconv.Atoi(os.Args[3])
	kv := GGMLTypeF16
	if os.Args[4] == "q8_0" { kv = GGMLTypeQ8_0 }
	e := f.EstimateLLaMACppRun(WithLLaMACppContextSize(int32(ctx)), WithLLaMACppLogicalBatchSize(2048), WithLLaMACppPhysicalBatchSize(int32(ub)), WithLLaMACppCacheKeyType(kv), WithLLaMACppCacheValueType(kv), WithLLaMACppOffloadLayers(999), WithFlashAttention())
	s := e.Summarize(false, 0, 0)
	b, _ := json.Marshal(s.Items[len(s.Items)-1].VRAMs)
	fmt.Println(string(b))
}
