// The camera in a dialog: a picture from it is given on as a JPEG file. Where there is none, it says why.

const $ = (id) => document.getElementById(id);
let stream = null, facing = "environment", taken = 0;

export function setUpCamera(onPicture) {
  const dialog = $("camera-dialog");
  $("camera").addEventListener("click", () => { dialog.showModal(); start(); });
  $("camera-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", stop);
  $("turn").addEventListener("click", () => { facing = facing === "user" ? "environment" : "user"; start(); });
  $("camera-file").addEventListener("click", () => { dialog.close(); $("capture").click(); });
  $("shoot").addEventListener("click", async () => {
    const picture = await take($("video"));
    dialog.close();
    onPicture(picture);
  });
}

async function start() {
  stop();
  show("");
  if (!navigator.mediaDevices) {
    show("The browser lets a page use the camera only over https or on this very machine (localhost).");
    return;
  }
  try {
    const asked = await navigator.mediaDevices.getUserMedia({ video: { facingMode: facing, width: { ideal: 1920 } } });
    if (!$("camera-dialog").open) { // closed while the browser was asking
      asked.getTracks().forEach((track) => track.stop());
      return;
    }
    stream = asked;
    $("video").srcObject = stream;
    await $("video").play();
    $("shoot").disabled = false;
    const devices = await navigator.mediaDevices.enumerateDevices();
    $("turn").hidden = devices.filter((device) => device.kind === "videoinput").length < 2;
  } catch (error) {
    show(reason(error));
  }
}

function stop() {
  if (stream) stream.getTracks().forEach((track) => track.stop());
  stream = null;
  $("video").srcObject = null;
  $("shoot").disabled = true;
}

function show(problem) {
  $("camera-problem").textContent = problem;
  $("shoot").hidden = $("video").hidden = problem !== "";
  $("camera-problem").hidden = $("camera-file").hidden = problem === "";
}

function reason(error) {
  if (error.name === "NotAllowedError") {
    return "The camera was not allowed. Allow it in the browser's settings for this page, and try again.";
  }
  if (error.name === "NotFoundError") return "There is no camera.";
  if (error.name === "NotReadableError") return "The camera is in use by another program.";
  return `The camera can't be used: ${error.message}`;
}

function take(video) {
  const canvas = document.createElement("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  taken += 1;
  const name = `camera ${taken}.jpg`;
  return new Promise((resolve) => {
    canvas.toBlob((blob) => resolve(new File([blob], name, { type: "image/jpeg" })), "image/jpeg", 0.95);
  });
}
