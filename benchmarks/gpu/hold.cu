// Holds a GPU back from inside llama-server's process, so that it runs like a smaller one:
//     nvcc -O2 -shared -Xcompiler -fPIC -o hold.so hold.cu
//     LD_PRELOAD=./hold.so HOLD=0000:07:00.0=126 llama-server …
// keeps 126 SMs of that device (its PCI id, as nvidia-smi prints it) busy with short kernels whose blocks take a whole SM's
// shared memory each; in processes that load a model, not in those that only list devices.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

static std::atomic<bool> ended{false};

__global__ void spin(long long cycles) {
  extern __shared__ char memory[];
  if (threadIdx.x == 0) memory[0] = 1;
  const long long start = clock64();
  while (clock64() - start < cycles) __nanosleep(500);
}

static bool loads_a_model() {
  FILE *file = fopen("/proc/self/cmdline", "r");
  char word[4096];
  size_t length = 0;
  bool found = false;
  for (int c; file && (c = fgetc(file)) != EOF;) {
    if (length + 1 < sizeof word) word[length++] = (char)c;
    if (c == 0) {
      found = found || strcmp(word, "--model") == 0;
      length = 0;
    }
  }
  if (file) fclose(file);
  return found;
}

static void hold(std::string pci_id, int sms) {
  const char *given = getenv("HOLD_CYCLES");
  const long long cycles = given ? atoll(given) : 1000000LL;
  const int shared_bytes = 220 * 1024;
  int device;
  if (cudaDeviceGetByPCIBusId(&device, pci_id.c_str()) != cudaSuccess || cudaSetDevice(device) != cudaSuccess) return;  // not visible
  cudaFuncSetAttribute(spin, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  int least, greatest;
  cudaDeviceGetStreamPriorityRange(&least, &greatest);
  cudaStream_t stream;
  cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest);
  cudaEvent_t done[2];
  for (cudaEvent_t &event : done) cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync);
  fprintf(stderr, "hold: %d SMs of device %d\n", sms, device);
  for (long i = 0; !ended; i++) {  // two launches in flight, so that the SMs are never free
    if (i >= 2) cudaEventSynchronize(done[i & 1]);
    spin<<<sms, 32, shared_bytes, stream>>>(cycles);
    cudaEventRecord(done[i & 1], stream);
  }
}

__attribute__((constructor)) static void begin() {
  char pci_id[32];
  int sms;
  const char *given = getenv("HOLD");
  if (given && sscanf(given, "%31[^=]=%d", pci_id, &sms) == 2 && sms > 0 && loads_a_model())
    std::thread(hold, std::string(pci_id), sms).detach();
}

__attribute__((destructor)) static void end() { ended = true; }
